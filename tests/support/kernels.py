"""Where tests of the Triton kernels run: at full size on a CUDA device, at small sizes in Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pagefork.kernels._triton import INTERPRETED


def need_a_gpu(items: list[pytest.Item]) -> None:
    """Marks the tests in folders called "fused": without the interpreter they need a GPU."""
    for item in items:
        if not INTERPRETED and item.path.parent.name == "fused":
            item.add_marker(pytest.mark.gpu)


def kernel_device() -> torch.device:
    """Where the kernels run; skips the test where they can't."""
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return torch.device("cuda")


@contextmanager
def torch_reads() -> Iterator[None]:
    """Samplers made here read logits in torch, wherever they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagefork.sampler.fused", lambda x: False)
        yield

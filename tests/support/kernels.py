"""Where tests of the Triton kernels run: at full size on a CUDA device, at small sizes in Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch

from pagefork.kernels import attention_tasks
from pagefork.kernels._triton import INTERPRETED
from pagefork.kernels.task_attention import TaskIndex

# Who decides whether the layers of a model run as kernels, or attention walks tables on the device.
_KERNELS = ("kv_cache", "rms_norm", "rope", "rope_write", "silu_mul")
_LAYERS = ("batch", "block_tables", *(f"kernels.{name}" for name in _KERNELS))


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


@contextmanager
def torch_layers() -> Iterator[None]:
    """Models that are made and run here compute their layers in torch, wherever they are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _LAYERS:
            module = import_module(f"pagefork.{name}")
            for decides in {"fused", "fused_on"} & set(vars(module)):
                patch.setattr(module, decides, lambda where: False)
        yield


@contextmanager
def small_tasks(split: int = 8, whole: int = 20) -> Iterator[None]:
    """Attention is cut into many tasks where kernels are interpreted: of `split` keys, and whole rows of 10 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setitem(attention_tasks.plan_tasks.__kwdefaults__, "split", split)
            patch.setattr(attention_tasks, "_WHOLE_HEIGHT", whole)
            patch.setattr(TaskIndex.__init__, "__defaults__", (split,))
            patch.setattr("pagefork.graph.SPLIT", split)
        yield

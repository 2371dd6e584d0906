"""Tests of the Triton kernels: on a CUDA device at full size, or in Triton's interpreter on CPU tensors at small sizes."""

from __future__ import annotations

import pytest
import torch

from pagefork.kernels._triton import INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the interpreter they need a GPU."""
    for item in items:
        if not INTERPRETED and "tests/kernels/fused/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return torch.device("cuda")

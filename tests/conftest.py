"""What many tests share."""

from __future__ import annotations

import pytest
import torch
from support import triton_first  # noqa: F401
from support.interpreter import patch_language_once
from support.kernels import kernel_device, need_a_gpu
from support.launches import check_launches

from pagefork import LLM
from pagefork.kernels import native_sampling
from pagefork.kernels._triton import INTERPRETED
from pagefork.kernels.native import library

# The models here are so small that a second thread only adds waiting.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    need_a_gpu(items)


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernels run."""
    return kernel_device()


@pytest.fixture(params=["native", "torch"])
def read_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads logits on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(native_sampling, "takes", lambda logits: False)
    elif library() is None:
        pytest.skip("the native library is not built")
    return str(request.param)


@pytest.fixture(autouse=INTERPRETED)
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched here is what is compiled ahead of time."""
    check_launches(monkeypatch)
    patch_language_once(monkeypatch)


@pytest.fixture(scope="session")
def demo() -> LLM:
    """The demo model in fp32, with a cache that is large enough for everything."""
    return LLM("demo", dtype="float32", num_blocks=1000, max_num_seqs=64)

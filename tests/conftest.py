"""What many tests share."""

from __future__ import annotations

import pytest
import torch

from pagefork import LLM

# The models here are so small that a second thread only adds waiting.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> LLM:
    """The demo model in fp32, with a cache that is large enough for everything."""
    return LLM("demo", dtype="float32", num_blocks=1000, max_num_seqs=64)

"""What engines take of a GPU's memory, and what they say when it is not enough."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint

from pagefork import LLM, SamplingParams
from pagefork.models.registry import load_model
from pagefork.models.weights import weights_size
from pagefork.scheduler.errors import ConfigError

pytestmark = pytest.mark.gpu

WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 8192, "num_hidden_layers": 4}


@pytest.fixture
def total() -> Iterator[int]:
    """Bytes that the device has; the allocator holds none of earlier tests."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.mem_get_info()[1]
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("stored", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_loading_takes_the_weights_and_hardly_more(tmp_path: Path, total: int, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Beside them, for a moment, the largest as it is stored and what it is fused from."""
    make_checkpoint(tmp_path, dtype=stored, **WIDE)
    before = torch.cuda.memory_allocated()
    model = load_model(tmp_path, dtype, torch.device("cuda", 0))
    size = weights_size(tmp_path, dtype)
    assert model.num_parameters * dtype.itemsize == size
    assert abs(torch.cuda.memory_allocated() - before - size) < 16 << 20  # the allocator may round large tensors up by 1 MiB
    assert torch.cuda.max_memory_allocated() - before < 1.6 * size


def test_the_largest_steps_run_beside_a_cache_that_was_asked_for(total: int) -> None:
    """Requests of the longest prompts and contexts run at once, with draws of all kinds of adjustments."""
    settings: dict[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "enable_prefix_caching": False}
    with pytest.raises(ConfigError, match=r"num_blocks=\d+ makes a cache of"):
        LLM("demo", device="cuda", num_blocks=2**30, **settings)
    llm = LLM("demo", device="cuda", kv_cache_memory=1 << 30, **settings)
    facts = llm.engine.info()
    assert facts["cache_memory"] <= 1 << 30 and facts["cache_memory"] + facts["free_memory"] < total
    length = llm.engine.max_model_len
    params = SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, repetition_penalty=1.1, ignore_eos=True, seed=1)
    outputs = llm.generate([[7] * (length - 8)] * 256, params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    llm.engine.check()


def test_settings_that_ask_for_more_than_there_is_are_named(total: int) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_memory=\d+ makes a cache of"):
        LLM("demo", device="cuda", kv_cache_memory=2 * total)


def test_memory_of_other_processes_is_left_to_them(total: int) -> None:
    """Tensors of this process that are not the engine's stand in for them: they are not free either."""
    held = torch.empty(total // 2, dtype=torch.uint8, device="cuda")
    free = torch.cuda.mem_get_info()[0]
    llm = LLM("demo", device="cuda", max_num_seqs=1 << 14, max_num_batched_tokens=2048, dtype="float32")
    assert llm.engine.info()["cache_memory"] < free
    assert held.nbytes == total // 2

"""The checks that run on a CUDA device (tests/engine/fused/test_gpu_*.py), small and on a CPU: they pass here, and can fail."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SIZES, make_checkpoint
from support.devices import bits, engine, excused, generated, soak, tokens
from support.strategies import STRATEGIES
from support.torch_path import torch_path

from pagefork import LLM

DRAW = random.Random(2)
PROMPTS = [[DRAW.randrange(3, SIZES["vocab_size"]) for _ in range(length)] for length in (5, 60, 33, 1, 17, 80, 2, 40, 9)]
PARAMS = [make() for make in STRATEGIES.values()]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3")
    make_checkpoint(directory, "qwen3")
    return directory


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with engine(str(path), device="cpu", hidden_states=True) as found:
        yield found


def test_other_settings_give_the_same_tokens(path: Path, llm: LLM) -> None:
    """Overlap, and another order in which prompts are computed, which moves the last bits of log-probs."""
    expected = generated(llm, PROMPTS, PARAMS)
    for settings in ({"overlap": True}, {"max_num_batched_tokens": 40, "block_size": 8}):
        with engine(str(path), device="cpu", hidden_states=True, **settings) as other:
            assert excused(llm, PROMPTS, PARAMS, generated(other, PROMPTS, PARAMS), expected) <= 1


def test_other_weights_are_not_excused(llm: LLM, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", rms_norm_eps=1e-2)
    expected = generated(llm, PROMPTS, PARAMS)
    with engine(str(tmp_path), device="cpu", hidden_states=True) as other:
        found = generated(other, PROMPTS, PARAMS)
    assert tokens(found) != tokens(expected)
    with pytest.raises(AssertionError, match="by a margin of"):
        excused(llm, PROMPTS, PARAMS, found, expected)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_bits_are_told_apart(path: Path, batch_invariant: bool) -> None:
    """Without the promise where torch computes: natively bits are the same anyway."""
    settings: dict[str, Any] = {"device": "cpu", "batch_invariant": batch_invariant, "num_threads": 1}
    prompts = [PROMPTS[5], PROMPTS[1], *PROMPTS]
    with nullcontext() if batch_invariant else torch_path():
        with engine(str(path), enable_prefix_caching=False, **settings) as one:
            alone = bits(one, prompts, 4, together=1)
            assert (bits(one, prompts, 4, together=len(prompts)) == alone) >= batch_invariant
        with engine(str(path), enable_prefix_caching=False, max_num_batched_tokens=24, **settings) as chunked:
            assert (bits(chunked, prompts, 4, together=len(prompts)) == alone) == batch_invariant


def test_a_mixed_load_leaves_nothing_behind(path: Path) -> None:
    settings: dict[str, Any] = {"num_blocks": 40, "block_size": 8, "max_num_seqs": 64, "max_num_batched_tokens": 64}
    with engine(str(path), device="cpu", hidden_states=True, overlap=True, **settings) as llm:
        ended = soak(llm.engine, SIZES["vocab_size"], 0.0)
    assert ended.keys() == {"length", "abort"}

"""With `invariant` the logits of a position have the same bits however it was computed: at once, in parts, or with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.devices import bits
from support.feeding import Feeder
from support.graphs import with_graphs
from support.kernels import small_tasks

from pagefork import LLM
from pagefork.kernels._triton import INTERPRETED
from pagefork.models.registry import load_model

LENGTHS = (19, 5) if INTERPRETED else (620, 270, 40)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_the_same_bits(dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    make_checkpoint(tmp_path, "qwen3", num_hidden_layers=1 if INTERPRETED else 3)
    model = load_model(tmp_path, dtype, device, invariant=True)
    generator = np.random.default_rng(0)
    tokens = [generator.integers(3, model.config.vocab_size, length).tolist() for length in LENGTHS]
    slots = 3 * len(tokens)
    feeder = Feeder(model, slots=slots, length=max(LENGTHS) + 1, batch_invariant=True)
    whole = [feeder.feed([(slot, 0, row)])[0] for slot, row in enumerate(tokens)]
    assert all(logits.isfinite().all() for logits in whole)
    together = feeder.feed([(len(tokens) + slot, 0, row) for slot, row in enumerate(tokens)])
    parts: list[list[torch.Tensor]] = [[] for _ in tokens]
    at = [0] * len(tokens)
    while left := [slot for slot, row in enumerate(tokens) if at[slot] < len(row)]:
        ends = {slot: int(generator.choice([1, LENGTHS[slot] // 2])) + at[slot] for slot in left}
        rows = [(2 * len(tokens) + slot, at[slot], tokens[slot][at[slot] : ends[slot]]) for slot in left]
        for slot, logits in zip(left, feeder.feed(rows), strict=True):
            parts[slot].append(logits)
            at[slot] += len(logits)
    for slot, expected in enumerate(whole):
        assert torch.equal(together[slot], expected)
        assert torch.equal(torch.cat(parts[slot]), expected)


def test_replayed_steps_give_the_same_bits(tmp_path: Path, device: torch.device) -> None:
    """Alone and among others, with graphs and without, as a whole and in parts."""
    make_checkpoint(tmp_path, "qwen3", vocab_size=200, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    settings: dict[str, Any] = {"dtype": "float32", "block_size": 4, "num_blocks": 40, "max_num_seqs": 3, "max_model_len": 32}
    generator = np.random.default_rng(1)
    prompts = [generator.integers(3, 200, length).tolist() for length in (9, 3, 13)]
    with small_tasks():
        graphs = with_graphs(str(tmp_path), device, batch_invariant=True, enable_prefix_caching=False, **settings)
        alone = bits(graphs, prompts[:2], 3, together=1)
        assert bits(graphs, prompts[:2], 3, together=2, crowd=prompts[2:]) == alone
        settings |= {"cuda_graphs": False, "max_num_batched_tokens": 6}
        launched = LLM(str(tmp_path), device=device.type, batch_invariant=True, enable_prefix_caching=False, **settings)
        assert bits(launched, prompts[:2], 3, together=2) == alone

"""A batch says, for every token, what a loop over the rows would say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.checkpoints import SIZES

from pagefork.batch import Batch, build_batch
from pagefork.cache import KVCache
from pagefork.kernels.linear import MIN_ROWS
from pagefork.models.config import parse_config
from pagefork.scheduler.plan import Rows, ints

SLIDING = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "max_position_embeddings": 64}
CONFIG = parse_config({**SIZES, **SLIDING, "architectures": ["Qwen2ForCausalLM"]})
TABLES = np.random.default_rng(0).permutation(60).reshape(5, 12).astype(np.int32) + 1
CACHE = KVCache(CONFIG, 61, 4, torch.float32, torch.device("cpu"))


def build(rows: list[tuple[int, int, int]]) -> Batch:
    """Of rows (slot, start, length), tokens counted up."""
    slot, start, length = zip(*rows, strict=True)
    count = sum(length)
    plan = Rows(ints(slot), ints(start), ints(np.cumsum([0, *length])), ints(range(count)), np.empty((0, 3), np.int32))
    return build_batch(plan, TABLES, CONFIG, CACHE)


ROWS = [(3, 17, 1), (0, 0, 6), (4, 7, 5), (1, 31, 1), (2, 40, 8)]


def test_positions_and_places_follow_the_tables() -> None:
    batch = build(ROWS)
    positions = [start + nth for _, start, length in ROWS for nth in range(length)]
    slots = [slot for slot, _, length in ROWS for _ in range(length)]
    assert batch.tokens.tolist() == list(range(21))
    assert batch.positions.tolist() == positions
    assert batch.blocks.tolist() == [TABLES[slot, at // 4] for slot, at in zip(slots, positions, strict=True)]
    assert batch.offsets.tolist() == [at % 4 for at in positions]


def test_blocks_that_are_begun_but_not_filled_are_named() -> None:
    """Row 0 continues a block, row 1 ends in a new one, row 2 fills its last, row 3 too, row 4 ends where a block ends."""
    batch = build(ROWS)
    expected = [
        TABLES[slot, (start + length - 1) // 4]
        for slot, start, length in ROWS
        if (start + length) % 4 and (start + length) // 4 * 4 >= start
    ]
    assert batch.begun.tolist() == expected == [TABLES[0, 1]]
    assert build([(2, 8, 1)]).begun.tolist() == [TABLES[2, 2]]


def test_few_tokens_are_padded_but_only_real_ones_written() -> None:
    batch = build([(1, 5, 1)])
    assert batch.tokens.shape == batch.positions.shape == (MIN_ROWS,)
    assert batch.blocks.tolist() == [TABLES[1, 1]] and batch.offsets.tolist() == [1]
    assert build([(1, 0, MIN_ROWS + 1)]).tokens.shape == (MIN_ROWS + 1,)


def test_layers_share_an_index_per_window() -> None:
    batch = build(ROWS)
    assert set(batch.attention) == {None, 9}
    assert [index.window for index in batch.attention.values()] == list(batch.attention)


def test_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        build([(0, 0, 3), (1, 4, 0)])
    with pytest.raises(ValueError, match="12 blocks of 4"):
        build([(0, 46, 3)])
    empty = Rows(ints(), ints(), ints([0]), ints(), np.empty((0, 3), np.int32))
    with pytest.raises(ValueError, match="0 rows"):
        build_batch(empty, TABLES, CONFIG, CACHE)
    plan = Rows(ints([0]), ints([0]), ints([0, 2]), ints([1, 2, 3]), np.empty((0, 3), np.int32))
    with pytest.raises(ValueError, match="2 tokens in all, but 3"):
        build_batch(plan, TABLES, CONFIG, CACHE)

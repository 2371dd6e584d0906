"""Attention over the paged cache, as torch computes it, equals dense attention in float64, for any mix of rows."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pagefork.kernels.attention_tiles import SPLIT, TILE
from pagefork.kernels.paged_attention import index_attention, index_torch, paged_attention

HEAD_DIM = 32


class Case(NamedTuple):
    """Rows of (start, length) with their queries, and the keys and values of every row in order."""

    rows: list[tuple[int, int]]
    q: Tensor  # [T, H, n]
    keys: list[Tensor]  # per row [start + length, kv heads, n]
    values: list[Tensor]

    def expected(self, scale: float, window: int | None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """The definition, row by row, in float64."""
        shared = self.q.shape[1] // self.keys[0].shape[1]
        out, at = [], 0
        for (start, length), *kv in zip(self.rows, self.keys, self.values, strict=True):
            q = self.q[at : at + length].double()
            k, v = (x.double().repeat_interleave(shared, 1) for x in kv)
            scores = torch.einsum("thn,shn->hts", q, k) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            position, key = torch.arange(start, start + length)[:, None], torch.arange(start + length)
            seen = (key <= position) & (key > position - (window or math.inf))
            scores = scores.masked_fill(~seen, -math.inf)
            if sinks is not None:  # a last key without a value
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, length, 1)], -1)
            p = scores.softmax(-1)[..., : start + length]
            out.append(torch.einsum("hts,shn->thn", p, v).flatten(1))
            at += length
        return torch.cat(out)


def make_case(
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    value_dim: int = HEAD_DIM,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    keys, values = ([normal(start + length, kv_heads, n) for start, length in rows] for n in (HEAD_DIM, value_dim))
    return Case(rows, normal(sum(length for _, length in rows), heads, HEAD_DIM), keys, values)


def attend(
    case: Case,
    block_size: int = 16,
    window: int | None = None,
    padding: int = 0,
    seed: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """The case over a cache in random block order. What a row does not own is NaN, but for keys behind its last: 0."""
    kv_heads, dtype = case.keys[0].shape[1], case.q.dtype
    counts = [-(-(start + length) // block_size) for start, length in case.rows]
    blocks = (np.random.default_rng(seed).permutation(sum(counts) + 9) + 1).astype(np.int32)
    tables = np.zeros((len(counts), max(counts)), np.int32)
    k_cache = torch.full((len(blocks) + 1, kv_heads, HEAD_DIM, block_size), torch.nan, dtype=dtype)
    v_cache = torch.full((len(blocks) + 1, kv_heads, block_size, case.values[0].shape[2]), torch.nan, dtype=dtype)
    used = 0
    for row, (count, k, v) in enumerate(zip(counts, case.keys, case.values, strict=True)):
        tables[row, :count] = blocks[used : used + count]
        used += count
        k_cache[tables[row, count - 1]] = 0
        for column in range(count):
            part = slice(column * block_size, (column + 1) * block_size)
            size = len(k[part])
            k_cache[tables[row, column], :, :, :size] = k[part].permute(1, 2, 0)
            v_cache[tables[row, column], :, :size] = v[part].transpose(0, 1)
    start, length = (np.array(column, np.int32) for column in zip(*case.rows, strict=True))
    heads = case.q.shape[1]
    index = index_torch(
        tables,
        start,
        length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        block_size=block_size,
        window=window,
        dtype=dtype,
        device=torch.device("cpu"),
        batch_invariant=batch_invariant,
    )
    q = torch.cat([case.q, torch.full((padding, heads, HEAD_DIM), torch.nan, dtype=dtype)])
    return paged_attention(q, k_cache, v_cache, index, 0.2, softcap=softcap, sinks=sinks)


LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT - 1, 2 * SPLIT, 2 * SPLIT + 1, 4 * SPLIT + 1, 700]
DECODE = [(length - 1, 1) for length in LENGTHS]
CHUNKS = [(0, 1), (0, 40), (3, 5), (0, TILE), (0, TILE + 1), (SPLIT - 1, 2), (100, 33), (0, 300), (517, 200), (640, 1)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (8, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 17, 300])
@pytest.mark.parametrize("rows", [DECODE, CHUNKS], ids=["decode", "mixed"])
def test_equals_dense_attention(rows: list[tuple[int, int]], window: int | None, heads: int, kv_heads: int) -> None:
    case = make_case(rows, heads, kv_heads)
    for batch_invariant in (False, True):
        found = attend(case, window=window, batch_invariant=batch_invariant)
        torch.testing.assert_close(found.double(), case.expected(0.2, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-2.0, 0.0, 1.0, 8.0])], ids=["plain", "sinks"])
def test_soft_caps_and_sinks_equal_their_definition(sinks: Tensor | None, softcap: float | None, window: int | None) -> None:
    case = make_case(DECODE + CHUNKS, 4, 2, value_dim=24)
    found = attend(case, window=window, padding=3, softcap=softcap, sinks=sinks)
    assert found.shape == (len(case.q) + 3, 4 * 24) and (found[-3:] == 0).all()
    torch.testing.assert_close(found[:-3].double(), case.expected(0.2, window, softcap, sinks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 5, 8, 32, 48, 256])
def test_any_block_size_gives_the_same(block_size: int) -> None:
    case = make_case(CHUNKS[:7] + DECODE, 4, 2)
    for window in (None, 20):
        for batch_invariant in (False, True):
            found = attend(case, block_size, window, batch_invariant=batch_invariant)
            torch.testing.assert_close(found.double(), case.expected(0.2, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_is_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    case = make_case(CHUNKS + DECODE, 8, 2, dtype)
    sinks = torch.linspace(-3, 3, 8, dtype=dtype)
    for softcap, extra in ((None, None), (2.0, sinks)):
        found, expected = attend(case, softcap=softcap, sinks=extra), case.expected(0.2, None, softcap, extra)
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("dtype", "block_size"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.float32, 5)])
@pytest.mark.parametrize("window", [None, 30])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(dtype: torch.dtype, block_size: int, window: int | None) -> None:
    """Cuts and tiles follow from the row alone, and every sum runs over one row's keys in order."""
    case = make_case([*CHUNKS, *DECODE, (2500, 1)], 4, 2, dtype)
    for batch_invariant in (False, True):
        together = attend(case, block_size, window, seed=1, batch_invariant=batch_invariant)
        at = 0
        for row, (start, length) in enumerate(case.rows):
            q = case.q[at : at + length]
            alone = Case([(start, length)], q, case.keys[row : row + 1], case.values[row : row + 1])
            found = attend(alone, block_size, window, batch_invariant=batch_invariant)
            assert torch.equal(found, together[at : at + length])
            at += length


class Way(NamedTuple):
    """How queries and keys make scores, and how long a context is."""

    heads: int
    kv_heads: int
    block_size: int
    window: int | None
    softcap: float | None = None
    sinks: Tensor | None = None


WAYS = {
    "plain": Way(6, 2, 16, None),
    "window": Way(4, 4, 16, 300),
    "narrow window": Way(4, 1, 8, 17),
    "odd blocks": Way(4, 2, 5, 200),
    "large blocks": Way(4, 2, 48, None),
    "capped": Way(4, 2, 16, None, 2.0),
    "sinks": Way(4, 2, 16, 300, None, torch.tensor([-2.0, 0.0, 1.0, 8.0])),
    "blocks too large for tiles": Way(4, 2, 256, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WAYS)
def test_the_bits_of_a_token_do_not_depend_on_how_its_row_is_cut(name: str, dtype: torch.dtype) -> None:
    """One row of 600 tokens at once, token by token and in chunks; tiles of every size occur."""
    way, length = WAYS[name], 600
    case = make_case([(0, length)], way.heads, way.kv_heads, dtype)

    def cut(ends: list[int]) -> Tensor:
        """As rows of their own in one step, over equal keys."""
        rows = [(begin, end - begin) for begin, end in itertools.pairwise([0, *ends])]
        keys, values = ([x[0][:end] for end in ends] for x in (case.keys, case.values))
        parts = Case(rows, case.q, keys, values)
        return attend(parts, way.block_size, way.window, softcap=way.softcap, sinks=way.sinks, batch_invariant=True)

    whole = cut([length])
    assert torch.equal(cut([128, 129, 140, 200, 263, 270, 511, length]), whole)
    assert torch.equal(cut([20, 300, length]), whole)
    for token in [0, 1, 255, 256, 301, *range(11, length, 12)]:
        q, keys, values = case.q[token : token + 1], case.keys[0][: token + 1], case.values[0][: token + 1]
        alone = Case([(token, 1)], q, [keys], [values])
        found = attend(alone, way.block_size, way.window, softcap=way.softcap, sinks=way.sinks, batch_invariant=True)
        assert torch.equal(found[0], whole[token]), token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contexts_that_are_worked_on_head_by_head_give_the_same_bits(dtype: torch.dtype) -> None:
    case = make_case([(2900, 100)], 8, 2, dtype)
    whole = attend(case, batch_invariant=True)
    for token in (0, 47, 99):
        q, keys, values = case.q[token : token + 1], case.keys[0][: 2901 + token], case.values[0][: 2901 + token]
        assert torch.equal(attend(Case([(2900 + token, 1)], q, [keys], [values]), batch_invariant=True)[0], whole[token])


def test_a_row_of_nan_stays_alone_and_padding_is_zero() -> None:
    case = make_case([(20, 1), (20, 1), (0, 50), (0, 50)], 4, 2)
    for row in (0, 2):
        case.keys[row][3] = torch.nan
        case.values[row][3] = torch.nan
    for batch_invariant in (False, True):
        out = attend(case, padding=6, batch_invariant=batch_invariant)
        assert out[0].isnan().all() and not out[1].isnan().any() and not out[52:].isnan().any()
        assert (out[-6:] == 0).all()


def test_large_scores_neither_overflow_nor_lose_the_sum() -> None:
    case = make_case([(400, 1), (0, 60)], 2, 2)
    case.q.mul_(300)
    torch.testing.assert_close(attend(case).double(), case.expected(0.2, None), rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    table = np.ones((1, 2), np.int32)

    def index(start: int, length: int, heads: int = 4, window: int | None = None) -> None:
        rows = np.array([start], np.int32), np.array([length], np.int32)
        index_attention(table, *rows, heads=heads, kv_heads=2, head_dim=8, block_size=4, window=window)

    for start, length in [(0, 9), (8, 1), (0, 0)]:
        with pytest.raises(ValueError, match="at most 2 blocks of 4"):
            index(start, length)
    with pytest.raises(ValueError, match="3 query heads"):
        index(0, 1, heads=3)
    with pytest.raises(ValueError, match="window"):
        index(0, 1, window=0)
    fine = index_attention(table, np.zeros(1, np.int32), np.ones(1, np.int32), heads=4, kv_heads=2, head_dim=8, block_size=4)
    k, v = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 4, 8)
    for q in (torch.zeros(0, 4, 8), torch.zeros(1, 3, 8), torch.zeros(1, 4, 16)):
        with pytest.raises(ValueError, match="queries"):
            paged_attention(q, k, v, fine, 1.0)
    with pytest.raises(ValueError, match="values as"):
        paged_attention(torch.zeros(1, 4, 8), k, torch.zeros(2, 4, 4, 8), fine, 1.0)
    with pytest.raises(ValueError, match="soft cap"):
        paged_attention(torch.zeros(1, 4, 8), k, v, fine, 1.0, softcap=0.0)
    with pytest.raises(ValueError, match="sinks"):
        paged_attention(torch.zeros(1, 4, 8), k, v, fine, 1.0, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match=r"torch.float16"):
        paged_attention(torch.zeros(1, 4, 8, dtype=torch.float16), k, v, fine, 1.0)

"""Native attention over the paged cache equals dense attention in float64; its bits depend on a token and its context alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.attention import Pages
from torch import Tensor

from pagefork.kernels.native import library, native_isa
from pagefork.kernels.native_attention import NativeIndex
from pagefork.kernels.paged_attention import index_attention, paged_attention

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not there")

SPLIT = 256  # keys, after which partial results come together
Row = tuple[int, int, int]  # slot, start, length


class Way(NamedTuple):
    """Sizes of a cache, and how queries and keys make scores."""

    heads: int = 6
    kv_heads: int = 2
    size: int = 32
    value_size: int = 32
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def pages(self, lengths: list[int], dtype: torch.dtype) -> Pages:
        sizes = {"value_size": self.value_size, "block_size": self.block_size}
        return Pages(self.heads, self.kv_heads, self.size, lengths, dtype=dtype, **sizes)

    def options(self) -> dict[str, Any]:
        sinks = torch.linspace(-3, 8, self.heads) if self.sinks else None
        return {"window": self.window, "softcap": self.softcap, "sinks": sinks}


WAYS = {
    "plain": Way(),
    "nine heads on three": Way(9, 3, 64, 64),
    "heads alone": Way(3, 3, 16, 16),
    "many heads on one": Way(50, 1, 16, 16),
    "window": Way(window=300),
    "narrow window": Way(4, 1, block_size=8, window=17),
    "one key": Way(window=1),
    "odd sizes": Way(4, 2, 33, 19, block_size=5, window=200),
    "blocks of one": Way(4, 2, 8, 4, block_size=1, sinks=True),
    "large blocks": Way(4, 2, 128, 80, block_size=48),
    "huge blocks": Way(block_size=256, softcap=2.0),
    "capped with sinks": Way(value_size=24, window=260, softcap=1.5, sinks=True),
}
LENGTHS = [1, 2, 15, 16, 17, 64, 65, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 1, 700]
DECODE = [(slot, length - 1, 1) for slot, length in enumerate(LENGTHS)]
CHUNKS = [(0, 0, 1), (5, 3, 5), (6, 0, 65), (9, 254, 3), (11, 500, 13), (12, 0, 290), (12, 290, 200), (12, 695, 5)]


def attend(pages: Pages, rows: list[Row], padding: int = 0, window: int | None = None, **options: Any) -> list[Tensor]:
    """[tokens, H, m] of each row. What a row doesn't see is NaN: blocks before its window and behind its end, too."""
    _, start, length = np.array(rows, np.int32).T
    size, table = pages.block_size, pages.table.numpy()
    tables = np.full((len(rows), table.shape[1]), table[0, -1])  # a block of NaN
    for row, (s, x, n) in enumerate(rows):
        seen = slice(0 if window is None else max(0, x - window + 1) // size, -(-(x + n) // size))
        tables[row, seen] = table[s, seen]
    sizes = {"heads": pages.heads, "kv_heads": pages.kv_heads, "head_dim": pages.size, "block_size": size}
    index = index_attention(tables, start, length, window=window, dtype=pages.dtype, **sizes)
    assert isinstance(index, NativeIndex)
    count = int(length.sum())
    fused = torch.full((count + padding, pages.heads + 3, pages.size), torch.nan, dtype=pages.dtype)
    fused[:count, 1:-2] = torch.cat([pages.queries[s][x : x + n] for s, x, n in rows])  # queries lie between other things
    out = paged_attention(fused[:, 1:-2], pages.k, pages.v, index, pages.size**-0.5, **options)
    out = out.view(count + padding, pages.heads, pages.value_size)
    assert not out[count:].any()
    return list(out[:count].split(length.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WAYS)
def test_equals_dense_attention(name: str, dtype: torch.dtype) -> None:
    way = WAYS[name]
    pages, options = way.pages(LENGTHS, dtype), way.options()
    tolerance = 5e-6 if dtype == torch.float32 else 8e-3
    for rows in (DECODE, CHUNKS, DECODE[3:5] + CHUNKS[4:6]):
        for row, found in zip(rows, attend(pages, rows, padding=3, **options), strict=True):
            expected = pages.dense(*row, **options)
            assert found.dtype == dtype
            assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max(), row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WAYS)
def test_the_bits_of_a_token_depend_on_what_it_sees_alone(name: str, dtype: torch.dtype) -> None:
    """A prompt as a whole, in chunks, beside others, token by token, and its splits one by one on another number of threads."""
    length = 2 * SPLIT + 70
    way = WAYS[name]
    pages, options = way.pages([length, 40], dtype), way.options()
    whole = attend(pages, [(0, 0, length)], **options)[0]
    for ends in ([1, 17, 64, 255, 256, 257, 300, 513, length], [130, 520, length]):
        parts = [(0, begin, end - begin) for begin, end in itertools.pairwise([0, *ends])]
        assert torch.equal(torch.cat(attend(pages, parts, **options)), whole)
    tokens = [0, 15, 16, 255, 256, 257, 511, 512, *range(7, length, 41)]
    together = attend(pages, [(1, 0, 40), *((0, token, 1) for token in tokens)], **options)[1:]
    for token, found in zip(tokens, together, strict=True):
        assert torch.equal(found[0], whole[token]), token
    torch.set_num_threads(2)
    try:
        assert torch.equal(attend(pages, [(0, 0, length)], **options)[0], whole)
        for token in (255, 256, 512, length - 1):
            assert torch.equal(attend(pages, [(0, token, 1)], **options)[0][0], whole[token]), token
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_every_instruction_set_does_the_same(isa: str) -> None:
    if native_isa() != "avx512_bf16":
        pytest.skip("run for all of them by a machine that has the best")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "plain or odd"]
    done = subprocess.run(command, env={**os.environ, "PAGEFORK_NATIVE": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_row_of_nan_stays_alone() -> None:
    pages = Way().pages([300, 300, 20], torch.bfloat16)
    for cache, dim in ((pages.k, 3), (pages.v, 2)):
        cache[int(pages.table[1, 2])].select(dim - 1, 3).fill_(torch.nan)
    for rows in ([(0, 299, 1), (1, 299, 1), (2, 19, 1)], [(0, 0, 300), (1, 40, 260), (2, 0, 20)]):
        first, second, third = attend(pages, rows)
        assert second.isnan().all() and not first.isnan().any() and not third.isnan().any()


def test_large_scores_neither_overflow_nor_lose_the_sum() -> None:
    pages = Way().pages([400, 60], torch.float32)
    for queries in pages.queries:
        queries.mul_(300)
    for row, found in zip(rows := [(0, 399, 1), (1, 0, 60)], attend(pages, rows), strict=True):
        torch.testing.assert_close(found.double(), pages.dense(*row), rtol=1e-3, atol=1e-3)


def test_another_cache_than_the_index_was_made_for_is_refused() -> None:
    pages = Way().pages([20], torch.float32)
    one = np.array([19], np.int32), np.array([1], np.int32)
    index = index_attention(pages.table.numpy(), *one, heads=6, kv_heads=2, head_dim=32, block_size=8)
    with pytest.raises(ValueError, match="block size"):
        paged_attention(torch.zeros(1, 6, 32), pages.k, pages.v, index, 1.0)
    index = index_attention(pages.table.numpy(), *one, heads=6, kv_heads=2, head_dim=32, block_size=16)
    with pytest.raises(ValueError, match="lie together"):
        paged_attention(torch.zeros(1, 6, 32), pages.k, pages.v.transpose(0, 1).contiguous().transpose(0, 1), index, 1.0)

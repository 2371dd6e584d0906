"""Causal attention of a flattened batch over the paged KV cache.

    out[t] = sum_j p[t, j] v[j],   p[t] = softmax over the keys j that t sees of (scale * q[t] · k[j])

A soft cap c replaces a score s by c * tanh(s / c); a sink is one more score in the softmax, with a value of zero.

Token t of a row at position x sees the row's keys at x - window + 1 .. x (0 .. x without a window); several query heads
share a KV head (GQA). Rows mix freely: one new token, a chunk of a prompt, a whole prompt. The cache holds the keys and
values of this step's tokens already. `index_attention` works out once per step where everything is; `paged_attention`
is called once per layer.

On a CPU the native library does it in place (`native_attention.py`), in bfloat16 and float32, and bits depend on nothing but
a token's query and what it sees. Elsewhere torch does.

Rows of few keys in all (one decoded token, above all) are cut into items (`attention_items.py`). Longer rows go through
torch's attention (`attention_sdpa.py`); where that can't serve or batches must not change bits, through tiles that
compute what items do (`attention_tiles.py`). torch reads blocks of keys whole, so what lies behind a block's last key must be
finite; of values only those that are seen are read, and in longer rows those of the same row behind them.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention_items import Items, Score, attend_items, index_items, whole_blocks
from .attention_sdpa import attend_sdpa, index_band
from .attention_tiles import TILE_SIZES, Chunk, attend_chunk, index_chunk, split_size
from .native_attention import NativeIndex, attend_native, index_native, native_attention
from .scratch import Scratch
from .task_attention import TaskIndex, attend_tasks

# Up to this many (token, key) pairs a row is cut into items: cheaper than the calls that torch's attention or a tile costs.
_SMALL = {False: 1024, True: 4096}  # by batch_invariant
_SPLIT = 256  # keys per item where they need not be those of tiles: fewer items have to be merged

logger = logging.getLogger("pagefork")


@dataclass(frozen=True, slots=True)
class AttentionIndex:
    """Where the keys and values of a step's tokens are; shared by all layers with one window. Made by `index_attention`."""

    tokens: int
    window: int | None
    items: Items | None
    chunks: list[Chunk]
    band: Tensor | None  # for torch's attention; None: tiles
    scratch: Scratch


Index: TypeAlias = AttentionIndex | NativeIndex | TaskIndex


def index_attention(
    tables: NDArray[np.int32],
    start: NDArray[np.int32],
    length: NDArray[np.int32],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch_invariant: bool = False,
) -> AttentionIndex | NativeIndex:
    """The index of R rows: row r has the length[r] tokens at positions start[r], start[r] + 1, ...

    tables: int32 [R, columns], the blocks of each row; start, length: int32 [R]; length >= 1. `dtype` is that of the
    queries. With `batch_invariant` the bits of a token's result depend only on its query and the keys and values that
    it sees, not on the other rows, nor on which of its row's tokens come in one step. Raises ValueError for a row
    without tokens or with fewer blocks than its positions need, and for arrays of different lengths.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} KV heads evenly")
    if window is not None and window < 1:
        raise ValueError(f"a window has at least one token; given {window}")
    if not len(tables) == len(start) == len(length):
        raise ValueError(f"{len(tables)} rows of blocks, {len(start)} starts and {len(length)} lengths do not go together")
    if len(length) and (length.min() < 1 or start.min() < 0 or (start + length).max() > tables.shape[1] * block_size):
        raise ValueError(f"rows need at least one token and at most {tables.shape[1]} blocks of {block_size}")
    device = torch.device(device)
    if native_attention(dtype, device):
        return index_native(
            tables, start, length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, window=window
        )
    return index_torch(
        tables,
        start,
        length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        window=window,
        dtype=dtype,
        device=device,
        batch_invariant=batch_invariant,
    )


def index_torch(
    tables: NDArray[np.int32],
    start: NDArray[np.int32],
    length: NDArray[np.int32],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool,
) -> AttentionIndex:
    """The index by which torch attends; arguments as those of `index_attention`, which has checked them."""
    first = np.concatenate(([0], np.cumsum(length, dtype=np.int64)))
    small = (length == 1) | (length.astype(np.int64) * (start + length) <= _SMALL[batch_invariant])
    if batch_invariant and not small.all():
        sizes = (heads, kv_heads, head_dim, block_size)
        small |= device.type != "cpu" or not tiles_equal_items(*sizes, dtype, torch.get_num_threads())
    row = np.repeat(np.flatnonzero(small), length[small])
    items = None
    if row.size:
        flat = np.flatnonzero(np.repeat(small, length))
        items = index_items(
            row,
            start[row] + flat - first[row],
            flat,
            tables,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            split=split_size(block_size) if batch_invariant else whole_blocks(_SPLIT, block_size),
            window=window,
            device=device,
        )
    chunks = [
        index_chunk(tables[r], int(first[r]), int(start[r]), int(length[r]), block_size=block_size, window=window, device=device)
        for r in np.flatnonzero(~small).tolist()
    ]
    band = None
    if chunks and not batch_invariant:
        band = index_band(max(c.start + c.tiles[-1].end - c.tiles[0].begin for c in chunks), window, dtype, device)
    return AttentionIndex(int(first[-1]), window, items, chunks, band, Scratch())


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: Index,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of T tokens over one layer of the cache; by Triton kernels if the index has tasks.

    q: [N, H, n] with N >= T: rows behind the tokens of the index are padding, their result is zero. k_cache, v_cache:
    as in `kv_cache.py`, of the dtype of q; values may have another size, m, than keys. softcap c makes a score s
    c * tanh(s / c) (Gemma 2). sinks: [H], one more score per query head that takes its part of the softmax and weighs no
    value (gpt-oss). Returns [N, H * m]. Raises ValueError for shapes that do not fit.
    """
    n, heads, head_dim = q.shape
    if n < index.tokens or heads % k_cache.shape[1] or head_dim != k_cache.shape[2] or v_cache.shape[1] != k_cache.shape[1]:
        raise ValueError(
            f"queries {list(q.shape)} do not go with {index.tokens} tokens, keys cached as {list(k_cache.shape)} "
            f"and values as {list(v_cache.shape)}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"queries are {q.dtype}, cached keys and values {k_cache.dtype} and {v_cache.dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"a soft cap is greater than 0; given {softcap}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks are one per query head, [{heads}]; given {list(sinks.shape)}")
    if isinstance(index, TaskIndex):
        return attend_tasks(q, k_cache, v_cache, index, scale, softcap=softcap, sinks=sinks)
    if isinstance(index, NativeIndex):
        return attend_native(q, k_cache, v_cache, index, scale, softcap, sinks)
    score = Score(scale, softcap, None if sinks is None else sinks.float())
    items = index.items
    if items is not None and items.flat.numel() == n:
        return attend_items(q, k_cache, v_cache, items, score).view(n, -1)
    out = q.new_empty(n, heads, v_cache.shape[3])
    out[index.tokens :] = 0
    if items is not None:
        out.index_copy_(0, items.flat, attend_items(q, k_cache, v_cache, items, score))
    for chunk in index.chunks:
        if index.band is None or softcap is not None or sinks is not None:
            attend_chunk(out, q, k_cache, v_cache, chunk, score, index.scratch)
        else:
            attend_sdpa(out, q, k_cache, v_cache, chunk, index.band, index.window, scale)
    return out.view(n, -1)


@functools.cache
def tiles_equal_items(heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether tiles give, on this CPU, the bits that items give: tried on random rows, once per process.

    It rests on the order in which matrix products add up. `threads` is how many torch runs on.
    """
    heads, kv_heads = min(kv_heads, 2) * heads // kv_heads, min(kv_heads, 2)
    split, ends = split_size(block_size), np.cumsum(TILE_SIZES)
    columns = -(-ends[-1] // split) * split // block_size
    start, table = columns * block_size - int(ends[-1]), np.arange(columns, dtype=np.int32)
    tried = np.arange(0, ends[-1], 7)
    row = np.zeros_like(tried)
    items = index_items(
        row,
        start + tried,
        tried,
        table[None],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        split=split,
    )
    chunks = [
        index_chunk(table, int(end - size), start + int(end - size), size, block_size=block_size)
        for size, end in zip(TILE_SIZES, ends, strict=True)
    ]
    score, generator = Score(head_dim**-0.5, None, None), torch.Generator().manual_seed(threads)

    def equal(dtype: torch.dtype) -> bool:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        q, k_cache = normal(int(ends[-1]), heads, head_dim), normal(columns, kv_heads, head_dim, block_size)
        v_cache = normal(columns, kv_heads, block_size, head_dim)
        found = torch.empty_like(q)
        for chunk in chunks:
            attend_chunk(found, q, k_cache, v_cache, chunk, score, Scratch())
        return torch.equal(found[items.flat], attend_items(q, k_cache, v_cache, items, score))

    same = equal(torch.float32) and equal(dtype)  # fewer bits hide most of what differs
    if not same:
        logger.info("batch_invariant: this machine computes prompts like single tokens, %s, head size %d: slow", dtype, head_dim)
    return same

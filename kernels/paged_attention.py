"""Causal attention of a flattened batch over the paged KV cache.

    out[t] = sum_j p[t, j] v[j],   p[t] = softmax over the keys j that t sees of (scale * q[t] · k[j])

Token t of a row at position x sees the row's keys at x - window + 1 .. x (0 .. x without a window); several query heads
share a KV head (GQA). Rows mix freely: one new token, a chunk of a prompt, a whole prompt. The cache holds the keys and
values of this step's tokens already. `index_attention` works out once per step where everything is; `paged_attention`
is called once per layer.

Rows of few keys in all (one decoded token, above all) are cut into items of (token, fixed stretch of keys). With the
cache laid out as `kv_cache.py` says, both products of an item are weighted sums of contiguous cache rows: exactly what
an embedding bag computes, in place, without gathering keys and values first. Each sum runs over one item's rows in
order, so a token's result does not depend on the other rows of the batch. Items of one token are merged by their
log-sum-exp (flash decoding). Sums are kept in float32; scores and probabilities are rounded to the cache's dtype. Blocks
of keys are read whole, so what lies behind a block's last key must be finite; of values only those that are seen are read.

Longer rows gather their keys and values once per layer and go through `scaled_dot_product_attention` in tiles of
queries, each with just the keys that its last token sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Array = NDArray[np.int64]

SPLIT = 256  # keys per item, rounded down to whole blocks
TILE = 64  # queries per tile of a longer row
_SMALL = 1024  # up to this many (token, key) pairs a row is cut into items: cheaper than the calls that a tile costs
_LANES = 32  # scores per item are padded to a multiple of this


@dataclass(frozen=True, slots=True)
class _Items:
    """The (token, stretch of keys) pairs: W items of at most S keys, for D tokens; P (item, head, block) triples in all."""

    query: Tensor  # [P] rows of the queries
    key_rows: Tensor  # [P * n] rows of the key cache: the components of a block
    key_bags: Tensor  # [W * H * blocks + 1] where each bag of them begins
    unseen: Tensor  # [W, 1, S] float32, -inf for keys that are not seen
    value_rows: Tensor  # [W * H * S] rows of the value cache
    value_bags: Tensor  # [W * H + 1]
    flat: Tensor  # [D] the flat index of each token
    merge: _Merge | None


@dataclass(frozen=True, slots=True)
class _Merge:
    """How the items of a token come together; M is the most items of a token."""

    item: Tensor  # [D, M]
    absent: Tensor  # [D, M, 1] fewer than M items
    rows: Tensor  # [D * H * M] rows of the items' outputs
    bags: Tensor  # [D * H + 1]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A longer row: tokens [begin, end) of the batch, over the keys of `blocks`, which begin at position `first_key`."""

    begin: int
    end: int
    start: int
    first_key: int
    blocks: Tensor  # [n]


@dataclass(frozen=True, slots=True)
class AttentionIndex:
    """Where the keys and values of a step's tokens are; shared by all layers with one window. Made by `index_attention`."""

    tokens: int
    window: int | None
    items: _Items | None
    chunks: list[_Chunk]
    band: Tensor | None  # [TILE, most keys] 0 where query seen from the end sees key seen from the end, else -inf


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
) -> AttentionIndex:
    """The index of R rows: row r has the length[r] tokens at positions start[r], start[r] + 1, ...

    tables: int32 [R, columns], the blocks of each row; start, length: int32 [R]; length >= 1. `dtype` is that of the
    queries. Raises ValueError for a row without tokens or with fewer blocks than its positions need.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} KV heads evenly")
    if window is not None and window < 1:
        raise ValueError(f"a window has at least one token; given {window}")
    if len(length) and (length.min() < 1 or (start + length).max() > tables.shape[1] * block_size):
        raise ValueError(f"rows need at least one token and at most {tables.shape[1]} blocks of {block_size}")
    first = np.concatenate(([0], np.cumsum(length, dtype=np.int64)))
    small = (length == 1) | (length.astype(np.int64) * (start + length) <= _SMALL)
    row = np.repeat(np.flatnonzero(small), length[small])
    items = None
    if row.size:
        flat = np.flatnonzero(np.repeat(small, length))
        position = start[row] + flat - first[row]
        cuts = _cut(row, position, block_size, window)
        items = _index_items(cuts, tables, flat, heads, kv_heads, head_dim, block_size, torch.device(device))
    chunks = []
    for r in np.flatnonzero(~small).tolist():
        lowest = 0 if window is None else max(0, int(start[r]) - window + 1) // block_size
        highest = -(-int(start[r] + length[r]) // block_size)
        blocks = torch.from_numpy(tables[r, lowest:highest].astype(np.int64)).to(device)
        chunks.append(_Chunk(int(first[r]), int(first[r + 1]), int(start[r]), lowest * block_size, blocks))
    band = _band(max(c.start + c.end - c.begin - c.first_key for c in chunks), window, dtype, device) if chunks else None
    return AttentionIndex(int(first[-1]), window, items, chunks, band)


@dataclass(frozen=True, slots=True)
class _Cuts:
    """W items: token `token` (an index of the D tokens) of row `row` sees keys [begin, end)."""

    token: Array
    row: Array
    begin: Array
    end: Array
    count: Array  # [D] items per token


def _cut(row: Array, position: Array, block_size: int, window: int | None) -> _Cuts:
    """Cuts what each token sees at fixed positions, so that the cuts depend on the token alone."""
    split = max(1, SPLIT // block_size) * block_size
    low = np.zeros_like(position) if window is None else np.maximum(0, position - window + 1)
    count = position // split - low // split + 1
    token = np.repeat(np.arange(len(row)), count)
    nth = np.arange(len(token)) - np.repeat(np.cumsum(count) - count, count)
    begin = (low[token] // split + nth) * split
    return _Cuts(token, row[token], np.maximum(begin, low[token]), np.minimum(begin + split, position[token] + 1), count)


def _index_items(
    cuts: _Cuts,
    tables: NDArray[np.int32],
    flat: Array,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    device: torch.device,
) -> _Items:
    column = cuts.begin // block_size
    begin, end = cuts.begin - column * block_size, cuts.end - column * block_size
    blocks = (end - 1) // block_size + 1
    # Torch's reductions over S give the same bits at any S that is a multiple of _LANES.
    step = _LANES // math.gcd(_LANES, block_size)
    most = -(-int(blocks.max()) // step) * step
    nth, key = np.arange(most), np.arange(most * block_size)
    # Behind its last key an item repeats that key: it weighs nothing there, and nothing foreign is ever read.
    row, last = cuts.row[:, None], (end - 1)[:, None]
    table = tables[row, column[:, None] + np.minimum(nth, last // block_size)].astype(np.int64)
    seen = np.minimum(key, last)
    value_row = np.take_along_axis(table, seen // block_size, 1) * (kv_heads * block_size) + seen % block_size

    def on_device(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    head = torch.arange(heads, device=device)[:, None]
    kv_head = head // (heads // kv_heads)
    present = on_device(nth < blocks[:, None])[:, None].expand(-1, heads, -1)
    query = (on_device(flat[cuts.token])[:, None, None] * heads + head).expand(-1, -1, most)[present]
    key_block = (on_device(table)[:, None] * kv_heads + kv_head)[present]
    unseen = on_device((key < begin[:, None]) | (key > last))[:, None]
    return _Items(
        query=query,
        key_rows=(key_block[:, None] * head_dim + torch.arange(head_dim, device=device)).view(-1),
        key_bags=functional.pad(present.reshape(-1).cumsum(0) * head_dim, (1, 0)),
        unseen=torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -math.inf),
        value_rows=(on_device(value_row)[:, None] + kv_head * block_size).view(-1),
        value_bags=torch.arange(0, len(cuts.row) * heads * len(key) + 1, len(key), device=device),
        flat=on_device(flat),
        merge=_index_merge(cuts.count, heads, device) if (cuts.count > 1).any() else None,
    )


def _index_merge(count: Array, heads: int, device: torch.device) -> _Merge:
    most = int(count.max())
    nth = np.arange(most)
    item = torch.from_numpy((np.cumsum(count) - count)[:, None] + np.minimum(nth, count[:, None] - 1)).to(device)
    absent = torch.from_numpy(nth >= count[:, None]).to(device)
    rows = item[:, None] * heads + torch.arange(heads, device=device)[:, None]
    return _Merge(item, absent[..., None], rows.reshape(-1), torch.arange(0, rows.numel() + 1, most, device=device))


def _band(keys: int, window: int | None, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    query_back = torch.arange(TILE - 1, -1, -1, device=device)[:, None]
    key_back = torch.arange(keys - 1, -1, -1, device=device)
    unseen = key_back < query_back
    if window is not None:
        unseen |= key_back >= query_back + window
    return torch.zeros(TILE, keys, dtype=dtype, device=device).masked_fill_(unseen, -math.inf)


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, index: AttentionIndex, scale: float) -> Tensor:
    """Attention of T tokens over one layer of the cache.

    q: [N, H, n] with N >= T: rows behind the tokens of the index are padding, their result is zero. k_cache, v_cache:
    as in `kv_cache.py`, of the dtype of q. Returns [N, H * n]. Raises ValueError for shapes that do not fit.
    """
    n, heads, head_dim = q.shape
    if n < index.tokens or heads % k_cache.shape[1] or head_dim != k_cache.shape[2]:
        raise ValueError(f"queries {list(q.shape)} do not go with {index.tokens} tokens and keys cached as {list(k_cache.shape)}")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"queries are {q.dtype}, cached keys and values {k_cache.dtype} and {v_cache.dtype}")
    items = index.items
    if items is not None and items.flat.numel() == n:
        return _attend_items(q, k_cache, v_cache, items, scale).view(n, heads * head_dim)
    out = q.new_zeros(n, heads, head_dim)
    if items is not None:
        out.index_copy_(0, items.flat, _attend_items(q, k_cache, v_cache, items, scale))
    for chunk in index.chunks:
        assert index.band is not None
        _attend_chunk(out, q, k_cache, v_cache, chunk, index.band, index.window, scale)
    return out.view(n, heads * head_dim)


def _attend_items(q: Tensor, k_cache: Tensor, v_cache: Tensor, items: _Items, scale: float) -> Tensor:
    """[D, H, n] for the D tokens that are cut into items."""
    _, heads, head_dim = q.shape
    count, _, width = items.unseen.shape
    weights = q.reshape(-1, head_dim).index_select(0, items.query).view(-1)
    products = _bag_sums(k_cache.view(-1, k_cache.shape[3]), items.key_rows, items.key_bags, weights)
    scores = torch.add(items.unseen, products.view(count, heads, width), alpha=scale)
    p = torch.softmax(scores, -1).to(q.dtype).view(-1)
    out = _bag_sums(v_cache.view(-1, head_dim), items.value_rows, items.value_bags, p)
    merge = items.merge
    if merge is None:
        return out.view(-1, heads, head_dim)
    mass = torch.logsumexp(scores, -1)[merge.item].masked_fill_(merge.absent, -math.inf)  # [D, M, H]
    share = torch.softmax(mass, 1).transpose(1, 2).reshape(-1)
    return _bag_sums(out.float(), merge.rows, merge.bags, share).to(q.dtype).view(-1, heads, head_dim)


def _bag_sums(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum of weights[i] * table[rows[i]] over bags[b] <= i < bags[b + 1]."""
    return functional.embedding_bag(rows, table, bags, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _attend_chunk(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: _Chunk, band: Tensor, window: int | None, scale: float
) -> None:
    """Writes out[begin:end] of a longer row."""
    _, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    shared = heads // kv_heads
    keys = k_cache.index_select(0, chunk.blocks).permute(1, 0, 3, 2).reshape(kv_heads, 1, -1, head_dim).expand(-1, shared, -1, -1)
    values = v_cache.index_select(0, chunk.blocks).transpose(0, 1).reshape(kv_heads, 1, -1, head_dim).expand(-1, shared, -1, -1)
    for begin in range(chunk.begin, chunk.end, TILE):
        end = min(begin + TILE, chunk.end)
        first = chunk.start + begin - chunk.begin
        low = 0 if window is None else max(0, first - window + 1 - chunk.first_key)
        high = first + end - begin - chunk.first_key
        tile = q[begin:end].view(end - begin, kv_heads, shared, head_dim).permute(1, 2, 0, 3)
        mask = band[TILE - (end - begin) :, band.shape[1] - (high - low) :]
        seen = functional.scaled_dot_product_attention(
            tile, keys[:, :, low:high], values[:, :, low:high], attn_mask=mask, scale=scale
        )
        out[begin:end].view(end - begin, kv_heads, shared, head_dim).copy_(seen.permute(2, 0, 1, 3))

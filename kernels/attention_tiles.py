"""Attention of longer rows over the paged cache, in tiles of queries.

A row gathers its keys and values once, in float32, by the same fixed stretches of keys that `attention_items.py` cuts,
and a tile of queries is multiplied with all stretches that it sees at once. Matrix shapes are fixed: short tiles and
stretches are filled up with zeros. What is computed of a stretch, where it is rounded, and how stretches come
together is what items do; only the products run through a matrix multiplication. Where that adds up one product
after another, as an embedding bag does, a token's result has the bits that it has as items: `paged_attention.py` checks.
Memory for intermediate results is used again from tile to tile and from layer to layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention_items import LANES, Score, log_mass, shares, whole_blocks
from .scratch import Scratch

TILE_SIZES = (16, 32, 64, 128)  # queries; all tiles of a row but the last have the most
TILE = TILE_SIZES[-1]
SPLIT = 128  # keys of a stretch; matrix products of this machine's library add up more than 192 in another order
_UNSEEN = -1e30  # finite, so that a stretch of which a query sees nothing is no NaN; its share becomes 0
_MEMORY = 1 << 19  # scores and results of a tile that are held at once, in numbers; then one KV head at a time


def split_size(block_size: int) -> int:
    """Keys of a stretch: whole blocks, at least one."""
    return whole_blocks(SPLIT, block_size)


class Tile(NamedTuple):
    """Queries [begin, end) of the batch, filled up to `size`, which see keys of stretches [low, high) of their row."""

    begin: int
    end: int
    size: int
    low: int
    high: int
    edge: int  # all queries see all keys of the stretches before this one
    unseen: Tensor  # [high - edge, 1, size, 1, width] float32, 0 or _UNSEEN


class Chunk(NamedTuple):
    """A longer row, over the S stretches of keys that it sees."""

    blocks: Tensor  # [S * blocks per stretch]
    start: int  # the first query's position, counted from the first stretch on
    stop: int  # keys of the last stretch that the row has
    tiles: list[Tile]


def index_chunk(
    table: NDArray[np.int32],
    begin: int,
    start: int,
    length: int,
    *,
    block_size: int,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> Chunk:
    """A row of `length` tokens from position `start`, whose queries begin at `begin`; table: [columns]."""
    split = split_size(block_size)
    width = -(-split // LANES) * LANES
    lowest = 0 if window is None else max(0, start - window + 1)
    first, count = lowest // split, (start + length - 1) // split - lowest // split + 1
    column = np.arange(first * split // block_size, (first + count) * split // block_size)
    # As items do: where there are no keys, the nearest blocks are repeated.
    blocks = table[np.clip(column, lowest // block_size, (start + length - 1) // block_size)].astype(np.int64)
    tiles = []
    for at in range(start, start + length, TILE):
        until = min(at + TILE, start + length)
        low = 0 if window is None else max(0, at - window + 1) // split - first
        high = (until - 1) // split - first + 1
        edge = max(low, (at + 1) // split - first) if window is None and width == split else low
        size = next(size for size in TILE_SIZES if size >= until - at)
        unseen = _unseen(at - (first + edge) * split, size, high - edge, split, width, window)
        tiles.append(Tile(begin + at - start, begin + until - start, size, low, high, edge, unseen.to(device)))
    start -= first * split
    return Chunk(torch.from_numpy(blocks).to(device), start, start + length - (count - 1) * split, tiles)


def _unseen(position: int, size: int, count: int, split: int, width: int, window: int | None) -> Tensor:
    """For `size` queries from `position`, counted from the first of `count` stretches on."""
    query = torch.arange(position, position + size)[:, None, None]
    offset = torch.arange(width)
    key = (torch.arange(count) * split)[:, None, None, None, None] + offset
    unseen = (key > query) | (offset >= split)
    if window is not None:
        unseen |= key <= query - window
    return torch.zeros(unseen.shape).masked_fill_(unseen, _UNSEEN)


def attend_chunk(out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: Chunk, score: Score, scratch: Scratch) -> None:
    """Writes out [N, H, m] for the tokens of a longer row. The other arguments are those of `paged_attention`."""
    kv_heads, head_dim, block_size = k_cache.shape[1:]
    shared = q.shape[1] // kv_heads
    keys, values = _gather(k_cache, v_cache, chunk, block_size, scratch)
    for tile in chunk.tiles:
        length = tile.end - tile.begin
        queries = scratch.take("queries", (kv_heads, tile.size, shared, head_dim), torch.float32, q.device)
        queries[:, :length] = q[tile.begin : tile.end].unflatten(1, (kv_heads, shared)).transpose(0, 1)
        queries[:, length:] = 0
        sinks = None
        if score.sinks is not None:
            sinks = score.sinks.view(kv_heads, 1, shared).expand(-1, tile.size, -1).flatten(1)
        seen = slice(tile.low, tile.high)
        held = (tile.high - tile.low) * queries[..., 0].numel() * (keys.shape[3] + values.shape[3])
        step = kv_heads if held <= _MEMORY else 1
        for head in range(0, kv_heads, step):
            some = slice(head, head + step)
            own = score._replace(sinks=None if sinks is None else sinks[some])
            found = _attend(queries[some].flatten(1, 2), keys[seen, some], values[seen, some], tile, own, q.dtype, scratch)
            found = found.unflatten(1, (tile.size, shared))[:, :length].transpose(0, 1)
            out[tile.begin : tile.end].unflatten(1, (kv_heads, shared))[:, some] = found


def _gather(k_cache: Tensor, v_cache: Tensor, chunk: Chunk, block_size: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Keys [S, kv heads, n, width] and values [S, kv heads, width, m] in float32; values are 0 where the row has none."""
    _, kv_heads, head_dim, _ = k_cache.shape
    split = split_size(block_size)
    count, width = chunk.blocks.numel() * block_size // split, -(-split // LANES) * LANES
    keys = scratch.take("keys", (count, kv_heads, head_dim, width), torch.float32, k_cache.device)
    values = scratch.take("cached", (count, kv_heads, width, v_cache.shape[3]), torch.float32, k_cache.device)
    parts = (count, split // block_size)
    rows = k_cache.index_select(0, chunk.blocks).unflatten(0, parts)
    keys[..., :split].unflatten(3, (parts[1], block_size)).copy_(rows.permute(0, 2, 3, 1, 4))
    rows = v_cache.index_select(0, chunk.blocks).unflatten(0, parts)
    values[:, :, :split].unflatten(2, (parts[1], block_size)).copy_(rows.permute(0, 2, 1, 3, 4))
    if width > split:
        keys[..., split:] = 0
        values[:, :, split:] = 0
    values[-1, :, chunk.stop :] = 0
    return keys, values


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, tile: Tile, score: Score, dtype: torch.dtype, scratch: Scratch
) -> Tensor:
    """queries: [heads, rows, n], keys: [S, heads, n, width], values: [S, heads, width, m]; returns [heads, rows, m]."""
    count, heads = keys.shape[:2]
    rows = queries.shape[1]

    def product(name: str, a: Tensor, b: Tensor) -> Tensor:
        out = scratch.take(name, (count * heads, rows, b.shape[3]), torch.float32, a.device)
        torch.bmm(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]), out=out)
        return _rounded(out, dtype, scratch).view(count, heads, rows, -1)

    if count > 1 and heads > 1:
        queries = scratch.take("repeated", (count, *queries.shape), torch.float32, queries.device).copy_(queries)
    scores = product("scores", queries.expand(count, heads, -1, -1), keys)
    if score.softcap is None:
        scores.mul_(score.scale)
    else:
        scores.mul_(score.scale / score.softcap).tanh_().mul_(score.softcap)
    scores[tile.edge - tile.low :].unflatten(2, (tile.size, -1)).add_(tile.unseen)
    merged = count > 1 or score.sinks is not None
    top = scores.amax(-1) if merged else None
    p = torch.softmax(scores, -1, out=scores)
    mass = None if top is None else log_mass(top, p)
    if dtype != torch.float32:
        p.copy_(scratch.like("rounded", p, dtype).copy_(p))
    found = product("found", p, values)
    if mass is None:
        return found[0]
    found.mul_(shares(mass.permute(1, 2, 0), score.sinks).permute(2, 0, 1)[..., None])
    total: Tensor = found[0]
    for part in found[1:]:
        total.add_(part)
    return total


def _rounded(x: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """float32 x rounded to dtype as an embedding bag rounds its sums: of bfloat16, halves go away from zero. In place."""
    if dtype == torch.bfloat16:
        x.view(torch.int32).add_(0x8000).bitwise_and_(-0x10000)
    elif dtype != torch.float32:
        x.copy_(scratch.like("rounded", x, dtype).copy_(x))
    return x

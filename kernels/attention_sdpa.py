"""Attention of longer rows over the paged cache through `scaled_dot_product_attention`.

A row gathers its keys and values once and goes through in tiles of queries, each with just the keys that its last
token sees. For long rows that is the fastest; its bits depend on where a row's tiles begin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .attention_tiles import Chunk

_TILE = 64  # queries


def index_band(keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[tile, keys]: 0 where a query, counted from the end, sees a key, counted from the end, else -inf."""
    query_back = torch.arange(_TILE - 1, -1, -1, device=device)[:, None]
    key_back = torch.arange(keys - 1, -1, -1, device=device)
    unseen = key_back < query_back
    if window is not None:
        unseen |= key_back >= query_back + window
    return torch.zeros(_TILE, keys, dtype=dtype, device=device).masked_fill_(unseen, -math.inf)


def attend_sdpa(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: Chunk, band: Tensor, window: int | None, scale: float
) -> None:
    """Writes out [N, H, m] for the tokens of a longer row. The other arguments are those of `paged_attention`."""
    kv_heads = k_cache.shape[1]
    shared = q.shape[1] // kv_heads
    keys = k_cache.index_select(0, chunk.blocks).permute(1, 0, 3, 2).reshape(kv_heads, 1, -1, k_cache.shape[2])
    values = v_cache.index_select(0, chunk.blocks).transpose(0, 1).reshape(kv_heads, 1, -1, v_cache.shape[3])
    keys, values = keys.expand(-1, shared, -1, -1), values.expand(-1, shared, -1, -1)
    begin, stop = chunk.tiles[0].begin, chunk.tiles[-1].end
    for at in range(begin, stop, _TILE):
        end = min(at + _TILE, stop)
        first = chunk.start + at - begin
        low = 0 if window is None else max(0, first - window + 1)
        high = first + end - at
        tile = q[at:end].unflatten(1, (kv_heads, shared)).permute(1, 2, 0, 3)
        mask = band[_TILE - (end - at) :, band.shape[1] - (high - low) :]
        seen = functional.scaled_dot_product_attention(
            tile, keys[:, :, low:high], values[:, :, low:high], attn_mask=mask, scale=scale
        )
        out[at:end].unflatten(1, (kv_heads, shared)).copy_(seen.permute(2, 0, 1, 3))

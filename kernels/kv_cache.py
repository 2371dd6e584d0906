"""Writes to the paged KV cache, and copies inside it.

Of a layer, keys are stored as [blocks, kv heads, head size, block size] and values as [blocks, kv heads, block size,
head size]. So a block's keys read as rows of one component over all its tokens (what `q · K` adds up) and its
values as rows of one token (what `p · V` adds up): both products are weighted sums of contiguous rows.
"""

from __future__ import annotations

from torch import Tensor

from .copy_rows import copy_rows


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, offsets: Tensor) -> None:
    """Stores the keys and values of T tokens, token t at offset offsets[t] of block blocks[t].

    k, v: [T, kv heads, head size], any strides; the caches as above; blocks, offsets: int64 [T]. No place may occur
    twice, but for padding tokens, whose block nobody reads. Raises ValueError for shapes that do not fit.
    """
    _, heads, size, block_size = k_cache.shape
    if k.shape != (blocks.numel(), heads, size) or v.shape != k.shape or offsets.shape != blocks.shape:
        raise ValueError(
            f"{blocks.numel()} places of [{heads}, {size}] each; given keys {list(k.shape)} and values {list(v.shape)}"
        )
    if v_cache.shape != (k_cache.shape[0], heads, block_size, size):
        raise ValueError(f"keys cached as {list(k_cache.shape)} do not go with values cached as {list(v_cache.shape)}")
    k_cache.permute(0, 3, 1, 2)[blocks, offsets] = k
    v_cache.transpose(1, 2)[blocks, offsets] = v


def copy_blocks(cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copies block src[i] to dst[i] in every layer of a cache [layers, blocks, ...]; all are read before one is written.

    src, dst: int64 [C]; no destination occurs twice. Raises ValueError if they differ in length.
    """
    copy_rows(cache, src, dst, dim=1)

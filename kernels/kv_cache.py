"""Writes to the paged KV cache, and copies inside it.

Of a layer, keys are stored as [blocks, kv heads, head size, block size] and values as [blocks, kv heads, block size,
head size]. So a block's keys read as rows of one component over all its tokens (what `q · K` adds up) and its
values as rows of one token (what `p · V` adds up): both products are weighted sums of contiguous rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ._triton import Variant, fused, jit, launch, power_of_two, tl
from .copy_rows import copy_rows

TOKENS = 16  # of a program: neighbours of a prompt write their keys next to each other


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, offsets: Tensor) -> None:
    """Stores the keys and values of T tokens, token t at offset offsets[t] of block blocks[t].

    k, v: [T, kv heads, head size], any strides; the caches as above; blocks, offsets: int64 or int32 [T]. No place may
    occur twice, but for padding tokens, whose block nobody reads. Raises ValueError for shapes that do not fit.
    """
    _, heads, size, block_size = k_cache.shape
    if k.shape != (blocks.numel(), heads, size) or v.shape != k.shape or offsets.shape != blocks.shape:
        raise ValueError(
            f"{blocks.numel()} places of [{heads}, {size}] each; given keys {list(k.shape)} and values {list(v.shape)}"
        )
    check_caches(k_cache, v_cache)
    if not fused(k_cache):
        k_cache.permute(0, 3, 1, 2)[blocks, offsets] = k
        v_cache.transpose(1, 2)[blocks, offsets] = v
        return
    check_together(k_cache, v_cache)
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    args = (k, v, k_cache, v_cache, blocks.contiguous(), offsets.contiguous(), len(k), *k.stride()[:2], *v.stride()[:2])
    block = power_of_two(size)
    constants = {"SIZE": size, "BLOCK": block, "TOKENS": TOKENS}
    launch(_write, (-(-len(k) // TOKENS), 2 * heads), *args, heads, block_size, warps=_warps(block), **constants)


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises ValueError unless keys and values are cached for the same blocks, heads and sizes."""
    blocks, heads, size, block_size = k_cache.shape
    if v_cache.shape != (blocks, heads, block_size, size):
        raise ValueError(f"keys cached as {list(k_cache.shape)} do not go with values cached as {list(v_cache.shape)}")


def check_together(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises ValueError unless each layer's keys and values lie together, as kernels take them."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"a layer's keys and values must lie together; the strides are {k_cache.stride()}, {v_cache.stride()}")


def copy_blocks(cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copies block src[i] to dst[i] in every layer of a cache [layers, blocks, ...]; all are read before one is written.

    src, dst: int64 [C]; no destination occurs twice. Raises ValueError if they differ in length.
    """
    copy_rows(cache, src, dst, dim=1)


@jit
def store_keys(
    cache: tl.tensor,
    x: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    token: tl.tensor,
    count: tl.tensor,
    block_stride: tl.tensor,
    block_size: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Stores WIDTH components of a head's keys, x [TOKENS, BLOCK], of the tokens from `token` on that are below `count`.

    cache: where the first of these components is in the first block. In the order of the pages: a warp writes
    neighbouring tokens of a block to neighbouring places.
    """
    flat = tl.arange(0, BLOCK * TOKENS)
    token += flat % TOKENS
    component = flat // TOKENS
    mask = (token < count) & (component < WIDTH)
    block = tl.load(blocks + token, mask=mask, other=0).to(tl.int64) * block_stride
    place = block + tl.load(offsets + token, mask=mask, other=0) + component * block_size
    tl.store(cache + place, tl.reshape(tl.trans(x), (BLOCK * TOKENS,)), mask=mask)


@jit
def store_values(
    cache: tl.tensor,
    x: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    token: tl.tensor,
    count: tl.tensor,
    block_stride: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """The same of values, of heads of SIZE components."""
    token += tl.arange(0, TOKENS)
    component, held = tl.arange(0, BLOCK), token < count
    block = tl.load(blocks + token, mask=held, other=0).to(tl.int64) * block_stride
    place = block + tl.load(offsets + token, mask=held, other=0) * SIZE
    tl.store(cache + place[:, None] + component[None, :], x, mask=held[:, None] & (component < WIDTH)[None, :])


@jit(changing=("blocks", "offsets", "count"))
def _write(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    count: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    heads: tl.tensor,
    block_size: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    first, head = tl.program_id(0) * TOKENS, tl.program_id(1)
    token, component = first + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    place, mask = token.to(tl.int64)[:, None], (token < count)[:, None] & (component < SIZE)[None, :]
    page, stride = SIZE * block_size, heads * SIZE * block_size
    if head < heads:
        x = tl.load(k + place * k_stride + head * k_head_stride + component[None, :], mask=mask)
        store_keys(k_cache + head * page, x, blocks, offsets, first, count, stride, block_size, SIZE, BLOCK, TOKENS)
    else:
        head -= heads
        x = tl.load(v + place * v_stride + head * v_head_stride + component[None, :], mask=mask)
        store_values(v_cache + head * page, x, blocks, offsets, first, count, stride, SIZE, SIZE, BLOCK, TOKENS)


def _warps(block: int) -> int:
    """Such that a thread moves 16 bytes at once."""
    return min(8, max(1, TOKENS * block // 256))


def variants() -> Iterator[Variant]:
    """Head sizes in use; others are padded to the next."""
    numbers = ("count", "k_stride", "k_head_stride", "v_stride", "v_head_stride", "heads", "block_size")
    for dtype in ("bf16", "fp16", "fp32"):
        values = dict.fromkeys(("k", "v", "k_cache", "v_cache"), f"*{dtype}")
        types = {**values, "blocks": "*i32", "offsets": "*i32", **dict.fromkeys(numbers, "i32")}
        for size in (64, 128, 256):
            yield Variant(_write, types, {"SIZE": size, "BLOCK": size, "TOKENS": TOKENS}, _warps(size))

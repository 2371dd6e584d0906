"""What comes between the product that gives queries, keys and values, and attention: one launch where kernels run.

Every head of the queries and keys is normalised if the model does so (`rms_norm.py`) and turned (`rope.py`); keys and
values are written to their pages (`kv_cache.py`). Every step rounds to the dtype as torch's functions do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._rounding import as_stored, rounded
from ._triton import Variant, fused, jit, launch, power_of_two, tl
from .kv_cache import TOKENS, check_caches, check_together, store_keys, store_values, write_kv
from .rms_norm import normed, rms_norm
from .rope import rope


def rope_write(
    qkv: Tensor,
    qk_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    blocks: Tensor,
    offsets: Tensor,
) -> Tensor:
    """The queries [N, H, D] as attention takes them, of N tokens; writes the keys and values of the first T of them.

    qkv: [N, H + 2 KV, D], heads of queries, keys and values; D is even. qk_weight: [H + KV, D], the weights of a norm over each
    head, with `eps`; None: no norm. cos, sin: [N, 1, D] of `rope_tables`. Caches, blocks and offsets [T], T <= N, as in
    `write_kv`. The bits of a token do not depend on the others. Raises ValueError for shapes that do not fit.
    """
    if not fused(qkv):
        return reference(qkv, qk_weight, eps, cos, sin, k_cache, v_cache, blocks, offsets)
    count, all_heads, size = qkv.shape
    kv_heads, block_size, written = k_cache.shape[1], k_cache.shape[3], blocks.numel()
    heads = all_heads - 2 * kv_heads
    if heads < 1 or k_cache.shape[2] != size or size % 2 or offsets.shape != blocks.shape or written > count:
        raise ValueError(f"{list(qkv.shape)} does not go with keys cached as {list(k_cache.shape)} and {written} places")
    if qk_weight is not None and qk_weight.shape != (heads + kv_heads, size):
        raise ValueError(f"the norms of {heads + kv_heads} heads of {size} have weights {list(qk_weight.shape)}")
    if cos.shape != (count, 1, size) or sin.shape != cos.shape:
        raise ValueError(f"{count} tokens need tables [{count}, 1, {size}]; given {list(cos.shape)} and {list(sin.shape)}")
    check_caches(k_cache, v_cache)
    check_together(k_cache, v_cache)
    if qkv.stride()[1:] != (size, 1):
        qkv = qkv.contiguous()
    q = torch.empty(count, heads, size, dtype=qkv.dtype, device=qkv.device)
    places = blocks.contiguous(), offsets.contiguous()
    args = (qkv, qk_weight, cos.contiguous(), sin.contiguous(), k_cache, v_cache, *places, q, eps, count, written)
    sizes = (qkv.stride(0), heads, kv_heads, block_size)
    block = power_of_two(size // 2)
    constants = {"HAS_NORM": qk_weight is not None, "HALF": size // 2, "BLOCK": block, "TOKENS": TOKENS}
    launch(_kernel, (-(-count // TOKENS), all_heads), *args, *sizes, warps=_warps(block), **constants)
    return q


def reference(
    qkv: Tensor,
    qk_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    blocks: Tensor,
    offsets: Tensor,
) -> Tensor:
    """The same one by one; what it returns is a part of a larger tensor."""
    kv_heads, written = k_cache.shape[1], blocks.numel()
    heads = qkv.shape[1] - 2 * kv_heads
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if qk_weight is not None:
        qk = rms_norm(qk, qk_weight, eps)
    qk = rope(qk, cos, sin)
    write_kv(qk[:written, heads:], v[:written], k_cache, v_cache, blocks, offsets)
    return qk[:, :heads]


@jit(changing=("blocks", "offsets", "count", "written"))
def _kernel(
    qkv: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    q: tl.tensor,
    eps: tl.tensor,
    count: tl.tensor,
    written: tl.tensor,
    stride: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    block_size: tl.tensor,
    HAS_NORM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A head of TOKENS tokens, in two halves: x at component i is turned with x at component i + HALF."""
    SIZE: tl.constexpr = 2 * HALF
    head = tl.program_id(1)
    token, part = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    inside, row = part < HALF, token.to(tl.int64)[:, None]
    mask = (token < count)[:, None] & inside[None, :]
    kind = q.dtype.element_ty
    x = qkv + row * stride + head * SIZE + part[None, :]
    first, second = tl.load(x, mask=mask, other=0.0), tl.load(x + HALF, mask=mask, other=0.0)
    if head < heads + kv_heads:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if HAS_NORM:
            square = tl.sum(a * a + b * b, 1)[:, None] / SIZE
            scale = weight + head * SIZE + part
            a = normed(a, square, tl.load(scale, mask=inside, other=0.0).to(tl.float32)[None, :], eps, kind)
            b = normed(b, square, tl.load(scale + HALF, mask=inside, other=0.0).to(tl.float32)[None, :], eps, kind)
        angle = row * SIZE + part[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angle + HALF, mask=mask, other=0.0).to(tl.float32)  # the first half has the other sign
        first = rounded(as_stored(a * c, kind) - b * s, kind)
        second = rounded(as_stored(b * c, kind) + a * s, kind)
    if head < heads:
        out = q + (row * heads + head) * SIZE + part[None, :]
        tl.store(out, first, mask=mask)
        tl.store(out + HALF, second, mask=mask)
    else:
        at, page, block = tl.program_id(0) * TOKENS, SIZE * block_size, kv_heads * SIZE * block_size
        if head < heads + kv_heads:
            keys = k_cache + (head - heads) * page
            store_keys(keys, first, blocks, offsets, at, written, block, block_size, HALF, BLOCK, TOKENS)
            store_keys(keys + HALF * block_size, second, blocks, offsets, at, written, block, block_size, HALF, BLOCK, TOKENS)
        else:
            values = v_cache + (head - heads - kv_heads) * page
            store_values(values, first, blocks, offsets, at, written, block, SIZE, HALF, BLOCK, TOKENS)
            store_values(values + HALF, second, blocks, offsets, at, written, block, SIZE, HALF, BLOCK, TOKENS)


def _warps(block: int) -> int:
    """Such that a thread reads 16 bytes at once."""
    return min(8, max(1, TOKENS * block // 256))


def variants() -> Iterator[Variant]:
    """Head sizes in use; others are padded to the next."""
    numbers = ("count", "written", "stride", "heads", "kv_heads", "block_size")
    for dtype in ("bf16", "fp16", "fp32"):
        values = dict.fromkeys(("qkv", "weight", "cos", "sin", "k_cache", "v_cache"), f"*{dtype}")
        types = {**values, "blocks": "*i32", "offsets": "*i32", "q": f"*{dtype}", "eps": "fp32", **dict.fromkeys(numbers, "i32")}
        for norm in (False, True):
            for half in (32, 64, 128):
                constants = {"HAS_NORM": norm, "HALF": half, "BLOCK": half, "TOKENS": TOKENS}
                yield Variant(_kernel, types, constants, _warps(half))

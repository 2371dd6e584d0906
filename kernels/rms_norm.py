"""Root-mean-square normalisation (Zhang and Sennrich 2019), with the residual addition before it.

    y = w * x / sqrt(mean(x²) + eps)

The mean and the quotient are computed in float32 and rounded to the dtype of x before the weight is applied, as in
transformers' Llama.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._rounding import as_stored, rounded
from ._triton import Variant, fused, jit, launch, power_of_two, tl

MOST = 16384  # values of a vector that one program holds


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Normalises the last dimension of x.

    x: [..., n]; weight: broadcasts against x, last dimension n. With `residual` (the shape of x) that tensor becomes
    residual + x *in place*, and the sum is what is normalised. Returns a new tensor shaped like x; x is unchanged.
    The bits of a vector do not depend on how many there are. Raises ValueError for shapes that do not fit.
    """
    n = x.shape[-1]
    if weight.shape[-1] != n:
        raise ValueError(f"the norm's weight has {weight.shape[-1]} values for vectors of {n}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"the residual is shaped {list(residual.shape)}, what is added to it {list(x.shape)}")
    rows = [x] if residual is None else [x, residual]
    if not fused(x) or weight.dim() > 1 or n > MOST or any(part.dim() != 2 or part.stride(1) != 1 for part in rows):
        return reference(x, weight, eps, residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = power_of_two(n)
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    args = (x, residual, weight, out, eps, n, *strides)
    launch(_kernel, (len(x),), *args, warps=_warps(block), HAS_RESIDUAL=residual is not None, BLOCK=block)
    return out


def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """The same in torch, for any shapes that fit."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    # In place wherever `wide` is a copy: fresh memory costs more than the arithmetic.
    y = wide * scale if wide is x else wide.mul_(scale).to(x.dtype)
    return y.mul_(weight)


@jit
def normed(x: tl.tensor, square: tl.tensor, weight: tl.tensor, eps: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """fp32, values of the type KIND: x, fp32, of vectors whose mean squares are `square`, times the weight, fp32."""
    return as_stored(as_stored(x * tl.div_rn(1.0, tl.sqrt_rn(square + eps)), KIND) * weight, KIND)


@jit
def _kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = column < width
    kind = out.dtype.element_ty
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual + row * residual_stride + column
        values = as_stored(values + tl.load(place, mask=mask, other=0.0).to(tl.float32), kind)
        tl.store(place, rounded(values, kind), mask=mask)
    square = tl.sum(values * values, 0) / width
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, rounded(normed(values, square, scale, eps, kind), kind), mask=mask)


def _warps(block: int) -> int:
    """Such that a thread reads 16 bytes at once, up to 16 warps."""
    return min(16, max(1, block // 256))


def variants() -> Iterator[Variant]:
    """Hidden sizes up to the largest in use."""
    for dtype in ("bf16", "fp16", "fp32"):
        for residual in (False, True):
            for block in (1024, 4096, MOST):
                values = dict.fromkeys(("x", "residual", "weight", "out"), f"*{dtype}")
                sizes = {"eps": "fp32", "width": "i32", "x_stride": "i32", "residual_stride": "i32"}
                yield Variant(_kernel, {**values, **sizes}, {"HAS_RESIDUAL": residual, "BLOCK": block}, _warps(block))

"""A matrix product whose rows are the same bits in any number of rows and at any place.

    y = x Wᵀ + b

Every program multiplies one tile of ROWS x COLUMNS numbers of y and adds up along the width of x in one order, in fp32. The tile
does not depend on how many rows there are: for few of them it is padded. This is for results that must not change with
the batch; cuBLAS, which picks another kernel for another number of rows, is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._rounding import rounded
from ._triton import INTERPRETED, Variant, constant, fused, jit, launch, tl

_GROUP = constant(8)  # tiles of rows that take turns at the same weights, which the second-level cache keeps meanwhile
_WIDENS = constant(INTERPRETED)  # the interpreter would multiply the bits of bfloat16
_WARPS = 4


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, N] of x [M, K], weight [N, K] and bias [N], of one dtype. Raises ValueError for others, and where no kernels run."""
    rows, width = x.shape
    columns = len(weight)
    if weight.shape != (columns, width) or not x.dtype == weight.dtype or (bias is not None and bias.shape != (columns,)):
        raise ValueError(f"{x.dtype} {list(x.shape)} can't be multiplied by {weight.dtype} {list(weight.shape)}")
    if not fused(x):
        raise ValueError(f"the invariant product is a Triton kernel: it needs a CUDA device with Triton, not {x.device}")
    x, weight = (part if part.stride(1) == 1 else part.contiguous() for part in (x, weight))
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    constants = _constants(x.dtype == torch.float32, bias is not None)
    grid = (-(-rows // constants["ROWS"]) * -(-columns // constants["COLUMNS"]),)
    strides = x.stride(0), weight.stride(0)
    launch(_kernel, grid, x, weight, bias, out, rows, columns, width, *strides, warps=_WARPS, **constants)
    return out


def _constants(exact: bool, bias: bool) -> dict[str, Any]:
    """`exact`: float32, multiplied without tensor cores."""
    tile = {"ROWS": 32, "COLUMNS": 64, "DEPTH": 16} if exact else {"ROWS": 64, "COLUMNS": 64, "DEPTH": 64}
    return {"HAS_BIAS": bias, **tile}


@jit(changing=("rows",))
def _kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    out_width: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row_tiles = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // (_GROUP * tl.cdiv(out_width, COLUMNS))
    place = tl.program_id(0) % (_GROUP * tl.cdiv(out_width, COLUMNS))
    high = tl.minimum(row_tiles - group * _GROUP, _GROUP)
    row = (group * _GROUP + place % high) * ROWS + tl.arange(0, ROWS)
    column = place // high * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left = x + row.to(tl.int64)[:, None] * x_stride + depth[None, :]
    right = weight + column.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, width, DEPTH):
        inside = begin + depth < width
        a = tl.load(left + begin, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + begin, mask=(column < out_width)[None, :] & inside[:, None], other=0.0)
        if _WIDENS:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < out_width, other=0.0).to(tl.float32)[None, :]
    y = out + row.to(tl.int64)[:, None] * out_width + column[None, :]
    tl.store(y, rounded(total, out.dtype.element_ty), mask=(row < rows)[:, None] & (column < out_width)[None, :])


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    sizes = {"rows": "i32", "out_width": "i32", "width": "i32", "x_stride": "i32", "weight_stride": "i32"}
    for dtype in ("bf16", "fp16", "fp32"):
        for bias in (False, True):
            types = {**dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}"), **sizes}
            yield Variant(_kernel, types, _constants(dtype == "fp32", bias), _WARPS)

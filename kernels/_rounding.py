"""Rounding inside of kernels as torch rounds: to the nearest number, ties to even."""

from __future__ import annotations

from ._triton import INTERPRETED, constant, jit, tl

_CUTS = constant(INTERPRETED)  # the interpreter cuts numbers to bfloat16


@jit
def rounded(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """x in fp32, as a number of the type KIND."""
    if _CUTS and KIND.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(KIND)
    else:  # noqa: RET505 - the compiler wants one type for each branch
        return x.to(KIND)


@jit
def as_stored(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """x in fp32, rounded to KIND and in fp32 again."""
    return rounded(x, KIND).to(tl.float32)

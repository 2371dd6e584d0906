"""Rotary position embedding (Su et al. 2021) in the half-split layout of Llama checkpoints.

A head x = (x1, x2) at position p turns, pair by pair, by the angles p * inv_freq:

    (x1 cos - x2 sin,  x2 cos + x1 sin)  =  x * (cos, cos) + roll(x, n/2) * (-sin, sin)

so with the sign folded into the table a rotation is one roll, one product and one multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._rounding import rounded
from ._triton import Variant, fused, jit, launch, power_of_two, tl


def rope_tables(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, signed sin), each [T, 1, n], for positions [T], integers, and inv_freq [n/2] in float32.

    Angles are computed in float32; `scale` (yarn's attention factor, else 1.0) multiplies both tables.
    """
    if positions.dim() != 1 or inv_freq.dim() != 1:
        raise ValueError(f"positions and inv_freq are vectors; given {list(positions.shape)} and {list(inv_freq.shape)}")
    if fused(positions):
        half = len(inv_freq)
        shape = (2, len(positions), 1, 2 * half)
        cos, sin = torch.empty(shape, dtype=dtype, device=positions.device)
        block = power_of_two(half)
        args = (positions.contiguous(), inv_freq.contiguous(), cos, sin, scale)
        launch(_tables, (len(positions),), *args, warps=_warps(block), HALF=half, BLOCK=block)
        return cos, sin
    angles = positions[:, None].to(torch.float32) * inv_freq
    cos, sin = angles.cos().mul_(scale), angles.sin().mul_(scale)
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates every head of x [T, heads, n] by the tables of `rope_tables`; queries and keys may go together.

    Returns a new, contiguous tensor. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 3 or cos.shape != (x.shape[0], 1, x.shape[2]) or sin.shape != cos.shape:
        raise ValueError(
            f"x [T, heads, n] needs tables [T, 1, n]; given {list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        )
    return torch.mul(x, cos).addcmul_(torch.roll(x, x.shape[-1] // 2, -1), sin).contiguous()


@jit(changing=("positions",))
def _tables(
    positions: tl.tensor,
    inv_freq: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    scale: tl.tensor,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token, pair = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = pair < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + pair, mask=mask, other=0.0)
    kind = cos.dtype.element_ty
    c, s = rounded(tl.cos(angle) * scale, kind), tl.sin(angle) * scale
    place = token * 2 * HALF + pair
    tl.store(cos + place, c, mask=mask)
    tl.store(cos + place + HALF, c, mask=mask)
    tl.store(sin + place, rounded(-s, kind), mask=mask)
    tl.store(sin + place + HALF, rounded(s, kind), mask=mask)


def _warps(block: int) -> int:
    return min(4, max(1, block // 32))


def variants() -> Iterator[Variant]:
    """Head sizes in use; others are padded to the next."""
    for dtype in ("bf16", "fp16", "fp32"):
        types = {"positions": "*i64", "inv_freq": "*fp32", "cos": f"*{dtype}", "sin": f"*{dtype}", "scale": "fp32"}
        for half in (32, 64, 128):
            yield Variant(_tables, types, {"HALF": half, "BLOCK": half}, _warps(half))

"""Rotary position embedding (Su et al. 2021) in the half-split layout of Llama checkpoints.

A head x = (x1, x2) at position p turns, pair by pair, by the angles p * inv_freq:

    (x1 cos - x2 sin,  x2 cos + x1 sin)  =  x * (cos, cos) + roll(x, n/2) * (-sin, sin)

so with the sign folded into the table a rotation is one roll, one product and one multiply-add.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, signed sin), each [T, 1, n], for positions [T] and inv_freq [n/2] in float32.

    Angles are computed in float32; `scale` (yarn's attention factor, else 1.0) multiplies both tables.
    """
    if positions.dim() != 1 or inv_freq.dim() != 1:
        raise ValueError(f"positions and inv_freq are vectors; given {list(positions.shape)} and {list(inv_freq.shape)}")
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

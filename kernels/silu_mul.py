"""The gate of a SwiGLU feed-forward layer (Shazeer 2020): y = silu(gate) * up, silu(x) = x / (1 + exp(-x))."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import even_slices


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2n], the gate in the first half of the columns and the up projection in the second. Returns [T, n].

    The bits of a row do not depend on how many rows there are.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate and up projection come as [T, 2n]; given {list(gate_up.shape)}")
    gate, up = gate_up.chunk(2, dim=1)
    out = torch.empty_like(up, memory_format=torch.contiguous_format)
    for rows in even_slices(gate):
        torch.ops.aten.silu.out(gate[rows], out=out[rows])
    return out.mul_(up)

"""The gate of a SwiGLU feed-forward layer (Shazeer 2020): y = silu(gate) * up, silu(x) = x / (1 + exp(-x))."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2n], the gate in the first half of the columns and the up projection in the second. Returns [T, n]."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate and up projection come as [T, 2n]; given {list(gate_up.shape)}")
    gate, up = gate_up.chunk(2, dim=1)
    return functional.silu(gate).mul_(up)

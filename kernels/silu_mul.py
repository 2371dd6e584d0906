"""The gate of a SwiGLU feed-forward layer (Shazeer 2020): y = silu(gate) * up, silu(x) = x / (1 + exp(-x)).

silu(gate) is rounded to the dtype before it is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._rounding import as_stored, rounded
from ._rows import even_slices
from ._triton import Variant, fused, jit, launch, tl

BLOCK = 1024  # columns of a program: 16 bytes for every thread


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2n], the gate in the first half of the columns and the up projection in the second. Returns [T, n].

    The bits of a row do not depend on how many rows there are. Raises ValueError for other shapes.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate and up projection come as [T, 2n]; given {list(gate_up.shape)}")
    if not fused(gate_up) or gate_up.stride(1) != 1:
        return reference(gate_up)
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    launch(_kernel, (rows, -(-width // BLOCK)), gate_up, out, gate_up.stride(0), width, BLOCK=BLOCK)
    return out


def reference(gate_up: Tensor) -> Tensor:
    """The same in torch."""
    gate, up = gate_up.chunk(2, dim=1)
    out = torch.empty_like(up, memory_format=torch.contiguous_format)
    for rows in even_slices(gate):
        torch.ops.aten.silu.out(gate[rows], out=out[rows])
    return out.mul_(up)


@jit
def _kernel(gate_up: tl.tensor, out: tl.tensor, stride: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    kind = out.dtype.element_ty
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    y = as_stored(gate / (1.0 + tl.exp(-gate)), kind) * up
    tl.store(out + row * width + column, rounded(y, kind), mask=mask)


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    for dtype in ("bf16", "fp16", "fp32"):
        types = {"gate_up": f"*{dtype}", "out": f"*{dtype}", "stride": "i32", "width": "i32"}
        yield Variant(_kernel, types, {"BLOCK": BLOCK})

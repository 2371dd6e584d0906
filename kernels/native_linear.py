"""Linear layers by the native library: csrc/matmul.h, for ctypes."""

from __future__ import annotations

import functools
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .huge_pages import allocate
from .native import library

KINDS = {torch.float32: 0, torch.bfloat16: 1}
_INT8 = 2
_PANEL = 32


class Weight(Structure):
    """A weight that is laid out: Weight in csrc/types.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("data", "scale", "bias")),
        *((name, c_int64) for name in ("out", "in")),
        *((name, c_int32) for name in ("kind", "unused")),
    ]


class NativeLinear:
    """y = x Wᵀ + b of weight [out, in] and bias [out], both float32 or both bfloat16, on a CPU; copied, the weight in the
    library's layout, and by int8 in 8 bits as int8.py has it.

    The bits of a row depend neither on the other rows nor on the number of threads.
    """

    __slots__ = ("_dtype", "held", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, int8: bool) -> None:
        (out, n), given = weight.shape, KINDS[weight.dtype]
        outs, pairs = -(-out // _PANEL) * _PANEL, -(-n // 2)
        inputs, size = (2 * pairs, 1) if int8 else (n, 4) if given == 0 else (2 * pairs, 2)
        data = allocate(outs * inputs * size)
        scale = torch.empty(outs) if int8 else None
        bias = None if bias is None else bias.detach().to(torch.float32, copy=True)
        self._dtype = weight.dtype
        self.held = tuple(tensor for tensor in (data, scale, bias) if tensor is not None)
        self.weight = Weight(data=data.data_ptr(), out=out, kind=_INT8 if int8 else given)
        setattr(self.weight, "in", n)
        self.weight.scale, self.weight.bias = (None if tensor is None else tensor.data_ptr() for tensor in (scale, bias))
        rows = weight.detach() if weight.stride(1) == 1 else weight.detach().contiguous()
        pack, _ = _calls()
        pack(rows.data_ptr(), given, rows.stride(0), byref(self.weight), torch.get_num_threads())

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] of the weight's dtype, on a CPU; ValueError otherwise."""
        if x.dtype != self._dtype or x.device.type != "cpu":
            raise ValueError(f"this linear layer takes {self._dtype} on a CPU; given {x.dtype} on {x.device}")
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty(x.shape[0], self.weight.out)
        kind, threads = KINDS[x.dtype], torch.get_num_threads()
        _, linear = _calls()
        linear(byref(self.weight), x.data_ptr(), len(x), x.stride(0), y.data_ptr(), self.weight.out, kind, threads)
        return y


def native_linear(dtype: torch.dtype, device_type: str) -> bool:
    """Whether layers of this dtype can be native."""
    return device_type == "cpu" and dtype in KINDS and library() is not None


@functools.cache
def _calls() -> tuple[Any, Any]:
    """`pack` and `linear`."""
    lib = library()
    assert lib is not None
    pack, linear = lib.pagefork_pack, lib.pagefork_linear
    pack.argtypes, pack.restype = [c_void_p, c_int32, c_int64, POINTER(Weight), c_int32], None
    linear.argtypes = [POINTER(Weight), c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int32, c_int32]
    linear.restype = None
    return pack, linear

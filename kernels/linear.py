"""Linear layers: y = x Wᵀ + b, with W laid out once for the machine that multiplies by it.

On a CPU a bfloat16 or float32 weight goes to the native library, or, where that is not built, is reordered once into
oneDNN's blocked layout. For few rows either reads weights faster than `torch.nn.functional.linear`, which reorders or misses
its cache at every call. Elsewhere the weight stays as it is, or as it is quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import fused
from .int8 import int8_linear, quantize
from .matmul import matmul
from .native_linear import NativeLinear, Weight, native_linear

# On a CPU, below this many rows, feed padding rows as well. Where oneDNN computes, it multiplies a single row by a kernel of its
# own whose sums run in another order, so a row alone would differ in its last bits from the same row in a batch; from two
# rows on results do not depend on the number of rows. Four rows are measured to be as fast as one, in float32 faster.
MIN_ROWS = 4

_EXPECTED_ROWS = 64  # what oneDNN blocks the weight for; 64 measured best over 1 to 2048 rows


class Linear:
    """A linear layer without gradient. weight: [out, in]; bias: [out]; both of one dtype, on one device.

    Calling it maps x [rows, in] to [rows, out]. With `invariant` the bits of a row do not depend on the other rows where
    kernels run; on other devices they don't where weights are packed. quantization: "int8" holds the weight in 8 bits, a
    scale for each output. Raises ValueError for shapes that do not fit.
    """

    __slots__ = ("_bias", "_invariant", "_native", "_packed", "_scale", "_weight", "in_features", "out_features")

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, invariant: bool = False, quantization: str | None = None
    ) -> None:
        if weight.dim() != 2:
            raise ValueError(f"a linear layer's weight is [out, in]; given {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias of a {list(weight.shape)} weight is [{weight.shape[0]}]; given {list(bias.shape)}")
        if bias is not None and bias.device != weight.device:
            raise ValueError(f"a linear layer's weight and bias are on one device; given {weight.device} and {bias.device}")
        if quantization not in (None, "int8"):
            raise ValueError(f"a linear layer's quantization is None or 'int8'; given {quantization!r}")
        self.out_features, self.in_features = weight.shape
        self._invariant = invariant and fused(weight)
        self._native: NativeLinear | None = None
        self._bias: Tensor | None = None
        self._scale: Tensor | None = None
        self._packed: Tensor | None = None
        self._weight: Tensor | None = None
        if not self._invariant and native_linear(weight.dtype, weight.device.type):
            self._native = NativeLinear(weight, bias, quantization == "int8")
            return
        self._bias = bias
        if quantization == "int8":
            weight, self._scale = quantize(weight)
        self._packed = None if self._invariant or self._scale is not None else _pack(weight)
        self._weight = None if self._packed is not None else weight

    @property
    def native(self) -> Weight | None:
        """What native code multiplies by, while this layer is there; None where the layer is not native."""
        return None if self._native is None else self._native.weight

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that it keeps: a weight that is laid out anew is not the one that was given."""
        if self._native is not None:
            return self._native.held
        return tuple(tensor for tensor in (self._packed, self._weight, self._scale, self._bias) if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"this linear layer takes [rows, {self.in_features}]; given {list(x.shape)}")
        if self._native is not None:
            return self._native(x)
        if self._packed is None:
            assert self._weight is not None
            if self._scale is not None:
                return int8_linear(x, self._weight, self._scale, self._bias)
            if self._invariant:
                return matmul(x, self._weight, self._bias)
            return functional.linear(x, self._weight, self._bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


def padded_rows(count: int, device: torch.device) -> int:
    """How many rows, padding included, to feed where there are `count` >= 0."""
    return max(count, MIN_ROWS) if device.type == "cpu" else count


def linear_backend(dtype: torch.dtype, device: torch.device, quantization: str | None = None) -> str:
    """Which path `Linear` takes: "native", "onednn-packed" or "torch"; in the first two a row's bits depend on no other row.

    With oneDNN that is so from MIN_ROWS rows on.
    """
    if native_linear(dtype, device.type):
        return "native"
    return "onednn-packed" if quantization is None and _packs(dtype, device.type) else "torch"


def _packs(dtype: torch.dtype, device_type: str) -> bool:
    if device_type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    operators: Any = torch.ops.mkldnn
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(operators._is_mkldnn_bf16_supported()))


def _pack(weight: Tensor) -> Tensor | None:
    if not _packs(weight.dtype, weight.device.type):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
    return packed

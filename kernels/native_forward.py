"""A step of a decoder of the Llama-shaped families as one native call: csrc/forward.h, for ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .huge_pages import mapped
from .linear import Linear
from .native import library
from .native_linear import KINDS, Weight

GATES = 16  # rows of the gate projection, and then of the up projection, that lie together

Ints = NDArray[np.int32]


class DecoderLayer(NamedTuple):
    """One layer. Queries, keys and values are one product, as are the gate and the up projection, natively `interleaved`."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None  # [heads + KV heads, head size]
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class _Layer(Structure):
    _fields_ = [
        *((name, Weight) for name in ("qkv", "out", "down", "gate_up")),
        *((name, c_void_p) for name in ("attention_norm", "qk_norm", "mlp_norm")),
        ("window", c_int64),
    ]


class _Model(Structure):
    _fields_ = [
        ("layers", c_void_p),
        ("head", Weight),
        *((name, c_void_p) for name in ("embedding", "norm", "inv_freq", "windows")),
        *((name, c_int64) for name in ("num_windows", "num_layers", "hidden", "heads", "kv_heads", "head_dim", "wide")),
        ("rope_scale", c_float),
        ("eps", c_float),
        ("dtype", c_int32),
        ("unused", c_int32),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("slot", "start", "offset", "tokens", "tables", "last", "fed")),
        *((name, c_void_p) for name in ("k", "v", "pages", "states", "workspace")),
        *((name, c_int64) for name in ("room", "rows", "columns", "blocks", "block_size")),
    ]


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both, [n, ...] each: GATES of the gate, as many of the other, and so on; zeros where the last ones lack some."""
    groups, whole = -(-len(gate) // GATES), len(gate) // GATES
    joined = gate.new_zeros(groups, 2, GATES, *gate.shape[1:])
    for side, rows in enumerate((gate, up)):
        joined[:whole, side] = rows[: whole * GATES].unflatten(0, (whole, GATES))
        joined[whole:, side, : len(rows) - whole * GATES] = rows[whole * GATES :]
    return joined.flatten(0, 2)


class NativeForward:
    """A decoder's layers, from tokens to the states after the last norm. Not for two threads at a time.

    embedding: [vocabulary, hidden]; None: it is what `head` multiplies by, which is held in the model's dtype then. norm:
    [hidden]; inv_freq: float32 [head_dim / 2]; wide: columns of the gate projection; all tensors but inv_freq are of one dtype,
    bfloat16 or float32, the linear layers native.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        embedding: Tensor | None,
        head: Linear,
        norm: Tensor,
        inv_freq: Tensor,
        *,
        rope_scale: float,
        eps: float,
        heads: int,
        kv_heads: int,
        wide: int,
    ) -> None:
        windows = list(dict.fromkeys(layer.window or 0 for layer in layers))
        lengths = (c_int64 * len(windows))(*windows)
        described = (_Layer * len(layers))(*(_described(layer, windows) for layer in layers))
        self._kept = layers, described, lengths, embedding, head, norm, inv_freq
        self._dtype, self._hidden = norm.dtype, len(norm)
        self._model = _Model(
            layers=ctypes.addressof(described),
            head=_weight(head),
            embedding=None if embedding is None else embedding.data_ptr(),
            norm=norm.data_ptr(),
            inv_freq=inv_freq.data_ptr(),
            windows=ctypes.addressof(lengths),
            num_windows=len(windows),
            num_layers=len(layers),
            hidden=len(norm),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=2 * len(inv_freq),
            wide=wide,
            rope_scale=rope_scale,
            eps=eps,
            dtype=KINDS[norm.dtype],
        )
        self._workspace, self._step = torch.empty(0, dtype=torch.uint8), _Step()
        self._given = byref(self._model), byref(self._step)

    def __call__(
        self,
        slot: Ints,
        start: Ints,
        offset: Ints,
        tokens: Ints,
        tables: Ints,
        last: Tensor | None,
        k: Tensor,
        v: Tensor,
        pages: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(states [T, hidden], tokens int64 [T], with what slots drew last) of rows.

        slot, start: [R]; offset: [R + 1]; tokens: [T], negative ones are last[slot] (int64 [slots]); tables: int32 [slots,
        columns]; k, v, pages: those of the KVCache, which are written.
        """
        rows, count, threads = len(slot), len(tokens), torch.get_num_threads()
        packed = np.concatenate((slot, start, offset, tokens), dtype=np.int32)  # one address instead of four
        tables = np.ascontiguousarray(tables, np.int32)
        states, fed = torch.empty(count, self._hidden, dtype=self._dtype), torch.empty(count, dtype=torch.int64)
        step, at = self._step, _address(packed)
        step.slot, step.start, step.offset, step.tokens = at, at + 4 * rows, at + 8 * rows, at + 12 * rows + 4
        step.tables, step.columns, step.rows = _address(tables), tables.shape[1], rows
        step.last = None if last is None else last.data_ptr()
        step.k, step.v, step.pages = k.data_ptr(), v.data_ptr(), None if pages is None else pages.data_ptr()
        step.blocks, step.block_size = k.shape[1], k.shape[4]
        step.states, step.fed = states.data_ptr(), fed.data_ptr()
        while lacking := _forward()(*self._given, threads):
            self._grow(lacking)
        return states, fed

    def _grow(self, size: int) -> None:
        """Makes the workspace so many bytes, by a quarter more: steps that grow by a block each do not grow it each time."""
        self._workspace, self._step.room = torch.empty(0, dtype=torch.uint8), 0  # first, so that there are never two
        self._workspace = mapped(size + size // 4)
        self._step.workspace, self._step.room = self._workspace.data_ptr(), len(self._workspace)


def _described(layer: DecoderLayer, windows: list[int]) -> _Layer:
    linears = {name: _weight(getattr(layer, name)) for name in ("qkv", "out", "down", "gate_up")}
    norms = {"attention_norm": layer.attention_norm, "qk_norm": layer.qk_norm, "mlp_norm": layer.mlp_norm}
    places = {name: None if norm is None else norm.data_ptr() for name, norm in norms.items()}
    return _Layer(**linears, **places, window=windows.index(layer.window or 0))


def _weight(layer: Linear) -> Weight:
    if layer.native is None:
        raise ValueError("the layers of a native step are native")
    return layer.native


def _address(array: Ints) -> int:
    return int(array.__array_interface__["data"][0])


@functools.cache
def _forward() -> Any:
    lib = library()
    assert lib is not None
    lib.pagefork_forward.argtypes, lib.pagefork_forward.restype = [POINTER(_Model), POINTER(_Step), c_int32], c_int64
    return lib.pagefork_forward

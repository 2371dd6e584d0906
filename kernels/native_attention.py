"""Attention over the paged cache by the native library: csrc/attention.h, for ctypes.

A step is planned once for all layers with one window and one size of values; keys and values are read where they lie.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .kv_cache import check_together
from .native import library
from .native_linear import KINDS

Ints = NDArray[np.int32]


class _Rows(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("slot", "start", "offset", "tables")),
        *((name, c_int64) for name in ("rows", "columns")),
    ]


class _Shape(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("heads", "kv_heads", "key_size", "value_size", "block_size", "window")),
        ("threads", c_int32),
        ("unused", c_int32),
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "out", "k", "v", "sinks")),
        *((name, c_int64) for name in ("q_stride", "q_head_stride", "out_stride")),
        ("scale", c_float),
        ("softcap", c_float),
    ]


@functools.cache
def _lib() -> ctypes.CDLL | None:
    lib = library()
    if lib is not None:
        lib.pagefork_attention_plan.argtypes = [POINTER(_Shape), POINTER(_Rows), c_void_p]
        lib.pagefork_attention_plan.restype = c_int64
        lib.pagefork_attention.argtypes = [c_void_p, POINTER(_Layer), c_int32, c_int32]
        lib.pagefork_attention.restype = None
    return lib


def native_attention(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the native library computes attention of this dtype there."""
    return device.type == "cpu" and dtype in KINDS and _lib() is not None


@dataclass(slots=True)
class NativeIndex:
    """Where the keys and values of a step's tokens are, for the native library. Made by `index_native`."""

    tokens: int
    sizes: tuple[int, int, int, int]  # query heads, KV heads, size of a head's keys, block size
    window: int | None
    start: Ints  # [R]
    offset: Ints  # [R + 1]
    tables: Ints  # [R, columns]
    blocks: int  # of the cache, at least: all that are read are below
    plans: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by value size and threads, with room for a layer's work

    def plan(self, value_size: int, threads: int) -> Tensor:
        key = value_size, threads
        if key not in self.plans:
            heads, kv_heads, size, block_size = self.sizes
            shape = _Shape(heads, kv_heads, size, value_size, block_size, self.window or 0, threads)
            at = (array.ctypes.data for array in (self.start, self.offset, self.tables))
            rows = _Rows(None, *at, *self.tables.shape)
            lib = _lib()
            assert lib is not None
            memory = torch.empty(lib.pagefork_attention_plan(byref(shape), byref(rows), None), dtype=torch.uint8)
            lib.pagefork_attention_plan(byref(shape), byref(rows), memory.data_ptr())
            self.plans[key] = memory
        return self.plans[key]


def index_native(
    tables: Ints, start: Ints, length: Ints, *, heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None
) -> NativeIndex:
    """The index of R rows; arguments as those of `index_attention`, which has checked them.

    Raises ValueError for a block below 0 among those that are read.
    """
    offset = np.concatenate(([0], np.cumsum(length)), dtype=np.int32)
    start, tables = (np.ascontiguousarray(x, np.int32) for x in (start, tables))
    first = start * 0 if window is None else np.maximum(start - window + 1, 0) // block_size
    column, end = np.arange(tables.shape[1]), -(-(start + length) // block_size)
    read = tables[(column >= first[:, None]) & (column < end[:, None])]
    if read.min(initial=0) < 0:
        raise ValueError(f"blocks are counted from 0; a table has block {read.min()}")
    sizes, blocks = (heads, kv_heads, head_dim, block_size), int(read.max(initial=-1)) + 1
    return NativeIndex(int(offset[-1]), sizes, window, start, offset, tables, blocks)


def attend_native(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, index: NativeIndex, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention as `paged_attention` describes it, which calls this after it checked what is given. Returns [N, H * m].

    Raises ValueError for an index of other sizes or of blocks that the cache lacks, for a dtype that is not native, and for
    caches that do not lie together.
    """
    n, heads, size = q.shape
    _, kv_heads, block_size, value_size = v_cache.shape
    if index.sizes != (heads, kv_heads, size, block_size) or k_cache.shape != (len(v_cache), kv_heads, size, block_size):
        raise ValueError(
            f"query heads, KV heads, head size and block size were {list(index.sizes)} when the step was indexed; given "
            f"queries {list(q.shape)}, keys cached as {list(k_cache.shape)} and values as {list(v_cache.shape)}"
        )
    if len(k_cache) < index.blocks:
        raise ValueError(f"rows have keys in block {index.blocks - 1}; the cache has {len(k_cache)} blocks")
    if not native_attention(q.dtype, q.device):
        raise ValueError(f"the step was indexed for native attention, which has no {q.dtype} on {q.device.type}")
    check_together(k_cache, v_cache)
    if q.stride(2) != 1:
        q = q.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    out = q.new_empty(n, heads * value_size)
    out[index.tokens :] = 0
    threads = torch.get_num_threads()
    layer = _Layer(
        q=q.data_ptr(),
        out=out.data_ptr(),
        k=k_cache.data_ptr(),
        v=v_cache.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        q_stride=q.stride(0),
        q_head_stride=q.stride(1),
        out_stride=heads * value_size,
        scale=scale,
        softcap=softcap or 0.0,
    )
    lib = _lib()
    assert lib is not None
    lib.pagefork_attention(index.plan(value_size, threads).data_ptr(), byref(layer), KINDS[q.dtype], threads)
    return out

"""Native kernels touch nothing outside of what they are given: here it ends, or begins, at a page that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from ctypes import byref
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.attention import Pages
from torch import Tensor

from pagefork.kernels import native_forward, native_linear
from pagefork.kernels import native_sampling as sampling
from pagefork.kernels.beam_merge import beam_merge
from pagefork.kernels.linear import Linear
from pagefork.kernels.native import library, native_isa
from pagefork.kernels.native_attention import index_native
from pagefork.kernels.paged_attention import index_attention, paged_attention
from pagefork.kernels.scratch import Scratch

pytestmark = pytest.mark.skipif(library() is None or sys.platform != "linux", reason="the native library, or Linux, is not there")

PATHS = ("avx512", "avx2")
DTYPES = (torch.float32, torch.bfloat16)
INF = torch.inf


def fenced(values: Tensor, at_end: bool = True) -> Tensor:
    """A copy that ends where a page begins that can't be touched, or begins where such a page ends."""
    page, nbytes = mmap.PAGESIZE, values.numel() * values.element_size()
    size = -(-nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    every = torch.frombuffer(memory, dtype=torch.uint8)
    begin = page + (size - nbytes if at_end else 0)
    found = every[begin : begin + nbytes].view(values.dtype).view(values.shape).copy_(values)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for fence in (0, page + size):
        assert protect(every.data_ptr() + fence, page, 0) == 0
    return found


class FencedScratch(Scratch):
    def take(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = self._buffers[name, dtype, device] = fenced(torch.zeros(prod(shape), dtype=dtype))
        return buffer.view(shape)


def check_linear(at_end: bool) -> None:
    pack, multiply = native_linear._calls()
    for dtype in DTYPES:
        for out, n in [(1, 1), (31, 3), (33, 33), (48, 2), (7, 2050)]:
            weight, bias = (fenced(torch.randn(shape).to(dtype), at_end) for shape in ((out, n), (out,)))
            for int8 in (False, True):
                layer = native_linear.NativeLinear(weight, bias, int8)
                for name, held in zip(("data", "scale", "bias") if int8 else ("data", "bias"), layer.held, strict=True):
                    setattr(layer.weight, name, (moved := fenced(held, at_end or name == "data")).data_ptr())
                    layer.held += (moved,)
                pack(weight.data_ptr(), native_linear.KINDS[dtype], n, byref(layer.weight), 1)
                for rows in (1, 2, 13):
                    x, y = (fenced(torch.randn(rows, width).to(dtype), at_end) for width in (n, out))
                    multiply(byref(layer.weight), x.data_ptr(), rows, n, y.data_ptr(), out, native_linear.KINDS[dtype], 1)
                    assert torch.equal(y, Linear(weight, bias, quantization="int8" if int8 else None)(x))


def check_attention(at_end: bool) -> None:
    for dtype in DTYPES:
        for heads, kv_heads, size, value_size in [(1, 1, 1, 3), (3, 1, 7, 5), (50, 1, 8, 8), (2, 2, 256, 256), (4, 2, 33, 19)]:
            for block, window in [(1, None), (5, 3), (16, 1), (17, None), (256, 260)]:
                pages = Pages(heads, kv_heads, size, [1, 40, 257], dtype=dtype, value_size=value_size, block_size=block)
                length = np.array([1, 30, 1], np.int32)
                start = np.array([1, 40, 257], np.int32) - length
                sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": size, "block_size": block, "window": window}
                plain = index_attention(pages.table.numpy(), start, length, dtype=dtype, **sizes)
                arrays = (torch.from_numpy(np.ascontiguousarray(x, np.int32)) for x in (pages.table.numpy(), start, length))
                index = index_native(*(fenced(array, at_end).numpy() for array in arrays), **sizes)
                q = torch.randn(32, heads, size).to(dtype)
                found, expected = (
                    paged_attention(*map(place, (q, pages.k, pages.v)), given, 0.3, sinks=place(torch.ones(heads)))
                    for place, given in ((lambda x: fenced(x, at_end), index), (lambda x: x, plain))
                )
                assert torch.equal(found, expected)


def rows_of(vocab: int) -> Tensor:
    """Rows of all sorts; NaN and infinity are in the last token, if anywhere."""
    rows = torch.randn(8, vocab)
    rows[1], rows[2], rows[3] = 0, -INF, rows[3] * 1e38
    rows[4, :-1], rows[5, -1], rows[6, -1], rows[7] = -INF, INF, torch.nan, rows[7] * 1e-40
    return rows


def check_sampling(at_end: bool) -> None:
    limits = [(1.0, 0, 1.0, 0.0), (1e-5, 3, 0.5, 0.1), (3e38, 1, 1e-300, 1.0), (0.7, 1 << 62, 1e-9, 1e-300)]
    for dtype in DTYPES:
        for vocab in (1, 2, 17, 64, 65, 1003):
            logits, adjusted = fenced(rows_of(vocab).to(dtype), at_end), fenced(rows_of(vocab).roll(1, 0), at_end)
            for temperature, top_k, top_p, min_p in limits:
                given = sampling.entries(logits, np.arange(8))
                given["flags"] = sampling.SHAPED | sampling.PROCESSED | sampling.RANKED
                given["temperature"], given["top_k"], given["top_p"], given["min_p"] = temperature, top_k, top_p, min_p
                for own in (logits, adjusted):
                    given["adjusted"] = 0 if own is logits else sampling.row_addresses(adjusted, np.arange(8))
                    found, best = sampling.read(logits, given, FencedScratch(), n=vocab + 3, ranks=True)
                    good = ~found.bad
                    assert torch.equal(found.bad, rows_bad(logits) | rows_bad(own))
                    drawn = own.gather(1, found.token.long()[:, None])[:, 0]
                    assert (drawn[good] >= found.floor[good]).all() and (drawn[good] > -INF).all()
                    assert (found.rank[good] >= 1).all() and (best.ids < vocab).all()
            bias = fenced(torch.randn(8), at_end)
            merged = beam_merge(logits, bias, [0, 0, 3, 8], vocab + 2)
            assert (merged.token < vocab).all() and (merged.parent < 8).all()


def rows_bad(values: Tensor) -> Tensor:
    return ~values.float().amax(1).isfinite()


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("check", [check_linear, check_attention, check_sampling])
def test_nothing_outside_is_touched(check: Any, at_end: bool) -> None:
    torch.manual_seed(3)
    check(at_end)


@pytest.mark.parametrize("isa", PATHS)
def test_nothing_outside_is_touched_on_another_path(isa: str) -> None:
    if isa == native_isa():
        pytest.skip("the other test's path")
    code = f"import {Path(__file__).stem} as m; print(m.native_isa()); m.check_linear(True); m.check_attention(True)"
    paths = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(__file__).parents[1]))
    environ = {**os.environ, "PAGEFORK_NATIVE": isa, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    if ran.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")


def test_tables_that_do_not_go_with_the_cache_are_refused() -> None:
    """Native code would read wherever they point."""
    cache, q = torch.randn(4, 1, 8, 16), torch.randn(2, 1, 8)
    sizes = {"heads": 1, "kv_heads": 1, "head_dim": 8, "block_size": 16}
    tables, start, length = np.array([[1, 4], [2, 9]], np.int32), np.array([20, 3], np.int32), np.ones(2, np.int32)
    with pytest.raises(ValueError, match="the cache has 4 blocks"):
        paged_attention(q, cache, cache.transpose(2, 3).contiguous(), index_attention(tables, start, length, **sizes), 1.0)
    with pytest.raises(ValueError, match="counted from 0"):
        index_attention(np.array([[0, 0], [-1, 0]], np.int32), start, length, **sizes)
    with pytest.raises(ValueError, match="do not go together"):
        index_attention(tables[:1], start, length, **sizes)
    shorter = index_attention(tables % 4, start, length, **sizes)
    with pytest.raises(ValueError, match="block size"):
        paged_attention(q, cache[..., :8].contiguous(), cache.transpose(2, 3).contiguous(), shorter, 1.0)


def test_a_workspace_that_could_not_grow_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is free by then."""

    def refused(size: int) -> Tensor:
        raise MemoryError(size)

    native = native_forward.NativeForward.__new__(native_forward.NativeForward)
    native._workspace, native._step = torch.empty(64, dtype=torch.uint8), native_forward._Step(room=64)
    monkeypatch.setattr(native_forward, "mapped", refused)
    with pytest.raises(MemoryError):
        native._grow(1000)
    assert native._step.room == 0

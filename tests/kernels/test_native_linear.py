"""Native linear layers: right on every instruction set that this machine has, and with the same bits for any number of rows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pagefork.kernels.huge_pages import allocate
from pagefork.kernels.int8 import quantize
from pagefork.kernels.linear import Linear
from pagefork.kernels.native import library, native_isa

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built here")

PATHS = ("avx512_bf16", "avx512", "avx2", "neon", "scalar")
SIZES = [(96, 64), (33, 7), (1, 130), (64, 1), (50, 71), (40, 2049), (70, 4500), (0, 8)]  # out, in


def held(weight: Tensor, quantization: str | None) -> Tensor:
    """The numbers that a layer multiplies by, in float64."""
    if quantization is None:
        return weight.double()
    values, scale = quantize(weight)
    return values.double() * scale.double()[:, None]


def check_sizes(dtype: torch.dtype, quantization: str | None) -> None:
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    for out, n in SIZES:
        torch.manual_seed(out + n)
        weight, bias = torch.randn(out, n).to(dtype), torch.randn(out).to(dtype)
        numbers = held(weight, quantization)
        for shift in (None, bias):
            layer = Linear(weight, shift, quantization=quantization)
            assert layer.native is not None
            for rows in (0, 1, 2, 3, 13, 40):
                x = torch.randn(rows, n).to(dtype)
                found, expected = layer(x), x.double() @ numbers.T + (0 if shift is None else shift.double())
                assert found.dtype == dtype and found.shape == expected.shape
                # How far off n + 2 operations in float32 may be at most.
                bound = (n + 2) * 2.0**-24 * (x.double().abs() @ numbers.abs().T) + (2.0**-23 + rounding) * expected.abs()
                assert ((found.double() - expected).abs() <= bound).all(), (out, n, rows)


def check_rows(dtype: torch.dtype, quantization: str | None) -> None:
    threads = torch.get_num_threads()
    for out, n in [(96, 576), (33, 71), (40, 4500)]:
        torch.manual_seed(n)
        layer = Linear(torch.randn(out, n).to(dtype), quantization=quantization)
        x = torch.randn(600, n).to(dtype)
        torch.set_num_threads(1)
        whole = layer(x)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 7, 12, 13, 64, 600):
                for start in (0, 600 - rows):
                    part = slice(start, start + rows)
                    assert torch.equal(layer(x[part]), whole[part]), (out, n, rows, count)
    torch.set_num_threads(threads)


def check_everything() -> None:
    """What the tests below ask of the path in use; for other paths it runs in processes of their own."""
    for dtype in (torch.float32, torch.bfloat16):
        for quantization in (None, "int8"):
            check_sizes(dtype, quantization)
            check_rows(dtype, quantization)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_float64_and_keeps_the_bits_of_a_row(path: str) -> None:
    code = (
        "import test_native_linear as t, pagefork.kernels.native as n, sys\n"
        f"if n.native_isa() != {path!r}: sys.exit('not on this machine')\n"
        "t.check_everything()"
    )
    paths = {"PYTHONPATH": str(Path(__file__).parent), "PYTHONSAFEPATH": "1"}
    environment = {**os.environ, **paths, "PAGEFORK_NATIVE": path, "OMP_WAIT_POLICY": "PASSIVE"}  # more threads than cores
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    if "not on this machine" in done.stderr:
        pytest.skip(f"{path} is not on this machine, which has {native_isa()}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_what_quantize_makes_of_it(dtype: torch.dtype) -> None:
    """Unit vectors read the numbers that are held: the values times the scale, rounded once."""
    torch.manual_seed(0)
    weight = torch.randn(70, 40).to(dtype)
    weight[3] = 0
    weight[5, :3] = torch.tensor([127.0, 2.5, -3.5])  # a scale near 1: halves may be ties, which go to the even number
    weight[5, 3:] = 0
    values, scale = quantize(weight)
    found = Linear(weight, quantization="int8")(torch.eye(40).to(dtype))
    assert torch.equal(found, (values * scale[:, None]).T.to(dtype))
    assert values[5, :3].tolist() == [127, 2, -4]


def test_a_weight_is_held_once() -> None:
    weight, bias = torch.randn(96, 64, dtype=torch.bfloat16), torch.randn(96, dtype=torch.bfloat16)
    assert sum(tensor.nbytes for tensor in Linear(weight, bias).held) == 96 * 64 * 2 + 96 * 4
    assert sum(tensor.nbytes for tensor in Linear(weight, quantization="int8").held) == 96 * 64 + 96 * 4
    assert all(tensor.data_ptr() != weight.data_ptr() for tensor in Linear(weight).held)


def test_any_strides_are_taken() -> None:
    wide = torch.randn(9, 80)
    weight = torch.randn(40, 5).T
    layer = Linear(weight)
    for x in (wide[::2, 40:], torch.randn(40, 6).T, torch.randn(1, 40).expand(4, 40)):
        assert torch.equal(layer(x), Linear(weight.contiguous())(x.contiguous()))


def test_another_dtype_than_the_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 on a CPU; given torch\.bfloat16"):
        Linear(torch.zeros(3, 4))(torch.zeros(2, 4, dtype=torch.bfloat16))


def test_memory_is_aligned_and_not_shared() -> None:
    parts = [allocate(size) for size in (1, 64, 100, 40 << 20, 7)]
    for value, part in enumerate(parts):
        part.fill_(value)
    assert [len(part) for part in parts] == [1, 64, 100, 40 << 20, 7]
    assert all(part.data_ptr() % 64 == 0 for part in parts)
    assert all(int(part.min()) == int(part.max()) == value for value, part in enumerate(parts))


def test_products_run_on_torchs_own_threads() -> None:
    """A second OpenMP runtime, or threads of the library's own, would fight torch's for the cores."""
    code = (
        "import torch, pathlib\n"
        "from pagefork.kernels.linear import Linear\n"
        "torch.set_num_threads(3)\n"
        "x = torch.randn(512, 512); x @ x; torch.randn(1 << 20).exp()\n"
        "tasks = lambda: len(list(pathlib.Path('/proc/self/task').iterdir()))\n"
        "before = tasks(); Linear(x)(x); Linear(x)(x[:1])\n"
        "maps = pathlib.Path('/proc/self/maps').read_text().splitlines()\n"
        "print(tasks() - before, len({line.split()[-1] for line in maps if 'libgomp' in line}))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["0", "1"]


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(30, 64)
    clean = Linear(torch.randn(64, 64))
    expected = clean(x)
    x[11, 3] = math.nan
    found = clean(x)
    assert found[11].isnan().all()
    assert torch.equal(found[:11], expected[:11]) and torch.equal(found[12:], expected[12:])

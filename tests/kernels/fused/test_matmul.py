"""The product is right, and a row of it is the same bits in any number of rows and at any place."""

from __future__ import annotations

import pytest
import torch

from pagefork.kernels.linear import Linear
from pagefork.kernels.matmul import matmul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "width"), [(1, 1), (67, 33), (3, 80)])
def test_it_is_the_product_in_float64(out: int, width: int, dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(out)
    x, weight, shift = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((19, width), (out, width), (out,))
    )
    expected = x.double() @ weight.double().T + (shift.double() if bias else 0)
    found = matmul(x, weight, shift if bias else None)
    assert found.dtype == dtype
    tolerance = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("rows", [257, 300, 520])
def test_tiles_of_many_rows_take_turns_at_the_weights(rows: int, device: torch.device) -> None:
    """In several groups, the last of which may be smaller: every tile is computed."""
    x, weight = torch.randn(rows, 8, device=device), torch.randn(130, 8, device=device)
    torch.testing.assert_close(matmul(x, weight).double(), x.double() @ weight.double().T, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_are_its_own(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((100, 70), (67, 70), (67,)))
    layer = Linear(weight, bias, invariant=True)
    whole = layer(x)
    for rows in (1, 3, 16, 17, 64):
        assert torch.equal(layer(x[:rows]), whole[:rows]), rows
    order = torch.randperm(100, generator=generator).to(device)
    assert torch.equal(layer(x[order]), whole[order])
    assert torch.equal(layer(x[order[:33]]), whole[order[:33]])


def test_neighbours_without_number_leave_a_row_alone(device: torch.device) -> None:
    x, weight = torch.randn(5, 40, device=device), torch.randn(9, 40, device=device)
    alone = matmul(x[2:3], weight)
    x[[0, 1, 3, 4]] = torch.nan
    assert torch.equal(matmul(x, weight)[2:3], alone)


def test_rows_may_be_parts_of_wider_ones(device: torch.device) -> None:
    wide, weight = torch.randn(9, 80, device=device), torch.randn(40, 5, device=device).t()
    assert torch.equal(matmul(wide[::2, 40:], weight), matmul(wide[::2, 40:].contiguous(), weight.contiguous()))
    assert matmul(wide[:0, :40], weight).shape == (0, 5)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, weight = torch.zeros(2, 8, device=device), torch.zeros(3, 8, device=device)
    for args in ((x, weight.half()), (x[:, :4], weight), (x, weight, x[0])):
        with pytest.raises(ValueError, match="can't be multiplied"):
            matmul(*args)

"""Weights in 8 bits: whole numbers times a scale for each output, and products by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pagefork.kernels.int8 import int8_linear, quantize
from pagefork.kernels.linear import Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_hand(weight: Tensor) -> np.ndarray:
    """What int8 makes of a weight without a row of zeros, in float64."""
    given = weight.float().numpy()
    scale = np.abs(given).max(1, keepdims=True) / np.float32(127)
    return np.rint(given / scale).astype(np.float64) * scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_the_nearest_multiple_of_its_rows_scale(dtype: torch.dtype) -> None:
    weight = (torch.randn(70, 33) * torch.logspace(-3, 3, 70)[:, None]).to(dtype)
    values, scale = quantize(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert values.abs().amax(1).eq(127).all()
    held = values.double() * scale.double()[:, None]
    assert ((held - weight.double()).abs() <= 0.5001 * scale.double()[:, None]).all()
    assert np.array_equal(held.numpy(), by_hand(weight))


def test_a_row_of_zeros_stays_zeros() -> None:
    values, scale = quantize(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert values.tolist() == [[0, 0], [64, -127]]
    assert scale[0] == 0
    layer = Linear(torch.zeros(5, 7), quantization="int8")
    assert layer(torch.ones(4, 7)).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "n"), [(96, 64), (33, 7), (1, 130), (400, 1500)])
def test_products_equal_those_of_the_rounded_weights_in_float64(out: int, n: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(out)
    weight, shift = torch.randn(out, n).to(dtype), torch.randn(out).to(dtype) if bias else None
    held = by_hand(weight)
    layer = Linear(weight.clone(), shift, quantization="int8")
    for rows in (1, 4, 50):
        x = torch.randn(rows, n).to(dtype)
        expected = torch.from_numpy(x.double().numpy() @ held.T) + (0 if shift is None else shift.double())
        for found in (layer(x), int8_linear(x, *quantize(weight), shift)):
            assert (found.shape, found.dtype) == ((rows, out), dtype)
            assert (found.double() - expected).abs().max() <= max(2 * torch.finfo(dtype).eps, 2e-6) * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_holds_a_byte_for_each_weight_and_a_scale_for_each_output(dtype: torch.dtype) -> None:
    weight = torch.randn(640, 256).to(dtype)
    assert sum(tensor.nbytes for tensor in Linear(weight, quantization="int8").held) <= 640 * (256 + 4) + 256
    assert sum(tensor.nbytes for tensor in Linear(weight).held) >= weight.nbytes


def test_another_quantization_is_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        Linear(torch.zeros(3, 4), quantization="int4")

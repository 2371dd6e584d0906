"""The norm by the kernel rounds where the one in torch does, and its rows don't notice each other."""

from __future__ import annotations

import pytest
import torch

from pagefork.kernels.rms_norm import reference, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 64, 576, 1000, 4096])
def test_it_is_the_norm_in_float64(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Before the weight is applied a value is rounded once, and after it again."""
    generator = torch.Generator().manual_seed(width)
    x, residual, weight = (torch.randn(rows, width, generator=generator).to(device, dtype) for rows in (5, 5, 1))
    x[0], residual[0] = 0, 0
    total = x + residual
    found = rms_norm(x, weight[0], 1e-5, residual)
    assert torch.equal(residual, total)
    wide = total.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=1.1 * eps + 1e-6, atol=1e-7)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "with a residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_almost_all_bits_are_those_of_torch(dtype: torch.dtype, residual: bool, device: torch.device) -> None:
    """In half precision: a sum in another order moves few results over the edge between two numbers."""
    generator = torch.Generator().manual_seed(1)
    x, weight, other = (torch.randn(rows, 768, generator=generator).to(device, dtype) for rows in (8, 1, 8))
    added = [other, other.clone()] if residual else [None, None]
    kept = x.clone()
    found, expected = rms_norm(x, weight[0], 1e-6, added[0]), reference(x, weight[0], 1e-6, added[1])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=eps)
    assert dtype == torch.float32 or (found != expected).float().mean() < 0.01
    assert torch.equal(x, kept)
    if added[0] is not None and added[1] is not None:
        assert torch.equal(added[0], added[1])


def test_rows_may_be_parts_of_wider_ones_and_do_not_notice_each_other(device: torch.device) -> None:
    wide = torch.randn(20, 300, device=device)
    x, weight = wide[:, 40:140], torch.randn(100, device=device)
    kept, whole = wide.clone(), rms_norm(x, weight, 1e-6)
    assert torch.equal(whole, rms_norm(x.contiguous(), weight, 1e-6)) and torch.equal(wide, kept)
    residual = torch.zeros(20, 150, device=device)
    assert torch.equal(rms_norm(x, weight, 1e-6, residual[:, 25:125]), whole)
    assert torch.equal(residual[:, 25:125], x) and not residual[:, :25].any() and not residual[:, 125:].any()
    for rows in (slice(3, 4), slice(None, None, 7), slice(19, 20)):
        assert torch.equal(rms_norm(x[rows], weight, 1e-6), whole[rows])
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 100)


def test_every_head_may_have_its_own_weight(device: torch.device) -> None:
    x, weight = torch.randn(6, 3, 8, device=device), torch.randn(3, 8, device=device)
    heads = [rms_norm(x[:, head], weight[head], 1e-6) for head in range(3)]
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.stack(heads, 1))

"""The gated product by the kernel rounds where the one in torch does."""

from __future__ import annotations

import pytest
import torch

from pagefork.kernels.silu_mul import BLOCK, reference, silu_mul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 24, BLOCK, 2 * BLOCK + 500])
def test_it_is_the_gated_product_in_float64(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """To the last bits of two roundings, and but for the last bits of exp what torch computes."""
    x = (4 * torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width))).to(device, dtype)
    kept = x.clone()
    gate, up = x.double().chunk(2, 1)
    found, expected = silu_mul(x), reference(x)
    tolerance = 1.1 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), gate / (1 + torch.exp(-gate)) * up, rtol=tolerance + 3e-6, atol=1e-7)
    assert dtype == torch.float32 or (found != expected).float().mean() < 0.01
    assert torch.equal(x, kept)


def test_gates_that_close_or_open_all_the_way(device: torch.device) -> None:
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4], device=device)
    found = silu_mul(torch.stack((gate, torch.full_like(gate, 2)), 1))
    assert found[:, 0].tolist() == [0, 0, 0, 0, 200, 2e4]


def test_rows_may_be_parts_of_wider_ones_and_do_not_notice_each_other(device: torch.device) -> None:
    wide = torch.randn(20, 300, device=device)
    x = wide[:, 40:240]
    whole = silu_mul(x)
    assert torch.equal(whole, silu_mul(x.contiguous()))
    for rows in (slice(3, 4), slice(None, None, 7), slice(19, 20)):
        assert torch.equal(silu_mul(x[rows]), whole[rows])
    assert silu_mul(x[:0]).shape == (0, 100)

"""The gated product in float64."""

from __future__ import annotations

import pytest
import torch

from pagefork.kernels.silu_mul import silu_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (4 * torch.randn(5, 24)).to(dtype)
    kept = x.clone()
    gate, up = x.double().chunk(2, 1)
    expected = gate / (1 + torch.exp(-gate)) * up
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(silu_mul(x).double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("shape", [(2, 7), (8,), (2, 2, 2)])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="T, 2n"):
        silu_mul(torch.zeros(shape))

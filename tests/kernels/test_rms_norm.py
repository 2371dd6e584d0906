"""The norm of transformers' Llama, with the residual added first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pagefork.kernels.rms_norm import rms_norm


def theirs(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = LlamaRMSNorm(len(weight), eps).to(x.dtype)
    norm.weight.data.copy_(weight)
    return norm(x).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 576), (17, 64), (5, 3, 16)])
def test_equals_transformers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(len(shape))
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    kept = x.clone()
    found = rms_norm(x, weight, 1e-5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, theirs(x, weight, 1e-5), rtol=tolerance, atol=tolerance)
    assert torch.equal(x, kept)


def test_the_residual_becomes_the_sum_that_is_normalised() -> None:
    x, residual, weight = torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)
    total, kept = x + residual, x.clone()
    found = rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(residual, total) and torch.equal(x, kept)
    torch.testing.assert_close(found, theirs(total, weight, 1e-6))


def test_every_head_may_have_its_own_weight() -> None:
    x, weight = torch.randn(6, 3, 8), torch.randn(3, 8)
    heads = [theirs(x[:, head], weight[head], 1e-6) for head in range(3)]
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.stack(heads, 1))


def test_a_sliced_input_is_left_alone() -> None:
    wide = torch.randn(4, 20)
    kept = wide.clone()
    torch.testing.assert_close(rms_norm(wide[:, 4:12], torch.ones(8), 1e-6), theirs(kept[:, 4:12], torch.ones(8), 1e-6))
    assert torch.equal(wide, kept)


def test_zeros_stay_zeros_and_the_bits_of_a_row_are_its_own() -> None:
    assert (rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6) == 0).all()
    x = torch.randn(70, 576).bfloat16()
    whole = rms_norm(x, torch.ones(576).bfloat16(), 1e-6)
    for rows in (1, 4, 33):
        assert torch.equal(rms_norm(x[:rows], torch.ones(576).bfloat16(), 1e-6), whole[:rows])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="7 values for vectors of 8"):
        rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6, torch.zeros(1, 8))

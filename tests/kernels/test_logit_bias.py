"""A bias is added where it is asked for and nowhere else."""

from __future__ import annotations

import pytest
import torch

from pagefork.kernels import apply_logit_bias


def test_bias_is_added_to_its_tokens_only() -> None:
    logits = torch.randn(4, 100, dtype=torch.float64)
    logits[2, 7] = -torch.inf
    row, token = torch.tensor([0, 2, 2, 3]), torch.tensor([99, 7, 8, 0])
    bias = torch.tensor([1.5, 100.0, -100.0, 0.25], dtype=torch.float64)
    expected = logits.clone()
    for r, t, b in zip(row, token, bias, strict=True):
        expected[r, t] += b
    found = apply_logit_bias(logits.float(), row, token, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert found[2, 7] == -torch.inf


def test_no_bias_is_a_copy() -> None:
    logits, none = torch.randn(2, 5).bfloat16(), torch.empty(0, dtype=torch.long)
    assert torch.equal(apply_logit_bias(logits, none, none, none.float()), logits.float())


def test_errors_name_what_is_allowed() -> None:
    logits, one = torch.zeros(2, 5), torch.tensor([1])
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 5\), not in \[5, 5\]"):
        apply_logit_bias(logits, one, one * 5, one.float())
    with pytest.raises(ValueError, match=r"rows must be in \[0, 2\), not in \[-1, -1\]"):
        apply_logit_bias(logits, -one, one, one.float())
    with pytest.raises(ValueError, match="parallel vectors"):
        apply_logit_bias(logits, one, one, torch.zeros(2))

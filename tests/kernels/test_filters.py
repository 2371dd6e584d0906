"""Filters keep what Hugging Face's warpers keep, and at the edges what their definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import logits as book
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pagefork.kernels import apply_min_p, apply_temperature, apply_top_k, apply_top_p

pytestmark = pytest.mark.usefixtures("read_by")

INF = torch.inf


def rows(vocab: int, seed: int = 0) -> torch.Tensor:
    """Flat, usual and peaked rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, vocab, generator=generator) * torch.tensor([0.1, 1.0, 3.0] * 3)[:, None]


@pytest.mark.parametrize("vocab", [63, 1000, 5000])
def test_filters_equal_hugging_face(vocab: int) -> None:
    logits = rows(vocab, vocab)
    none = torch.empty(9, 0, dtype=torch.long)
    for k in (1, 5, 50, 129, 700):
        expected = TopKLogitsWarper(top_k=k)(none, logits)  # type: ignore[no-untyped-call]
        assert torch.equal(apply_top_k(logits, k), expected)
    for p in (0.01, 0.3, 0.9, 0.95, 0.999):
        expected = TopPLogitsWarper(top_p=p)(none, logits)  # type: ignore[no-untyped-call]
        assert torch.equal(apply_top_p(logits, p), expected)
        assert torch.equal(apply_min_p(logits, p), MinPLogitsWarper(min_p=p)(none, logits))  # type: ignore[no-untyped-call]
    for t in (0.2, 0.7, 1.3):
        expected = TemperatureLogitsWarper(t)(none, logits)  # type: ignore[no-untyped-call]
        assert torch.equal(apply_temperature(logits, t), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 999, 4097, 9001])
def test_support_equals_the_float64_support(vocab: int, dtype: torch.dtype) -> None:
    """Exactly for k and min-p; for p unless float64 itself decides by less than 1e-6 of mass. 16-bit rows are full of ties."""
    logits = rows(vocab, vocab).to(dtype)
    cases = [{"top_k": k} for k in (-1, 0, 1, 2, 63, 64, 130, vocab - 1, vocab, vocab + 1, 2**30) if k >= -1]
    cases += [{"min_p": m} for m in (0.0, 1e-9, 0.05, 0.5, 1.0)]
    cases += [{"top_p": p} for p in (1e-6, 0.2, 0.5, 0.9, 0.95, 0.99, 1 - 2**-24, 1.0)]
    apply = {"top_k": apply_top_k, "top_p": apply_top_p, "min_p": apply_min_p}
    skipped = 0
    for case in cases:
        ((name, value),) = case.items()
        found = apply[name](logits, value)
        for row, result in zip(logits.float().numpy(), found.numpy(), strict=True):
            expected = book.kept(row, case)
            if expected.margin < 1e-6:
                skipped += 1
                continue
            assert ((result > -np.inf) == expected.mask).all(), case
            assert (result[expected.mask] == row[expected.mask]).all()
    assert skipped <= 0.1 * len(cases) * len(logits)


def test_ties_of_a_threshold_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]])
    for k in (3, 4, 5):
        assert apply_top_k(logits, k).isfinite().tolist() == [[True, True, True, True, True, False]]
    weight = logits.exp()
    p = float((weight[0, 1] + weight[0, 3] + 0.5 * weight[0, 0]) / weight.sum())
    assert apply_top_p(logits, p).isfinite().tolist() == [[True, True, True, True, True, False]]
    assert apply_top_p(logits, 1e-9).isfinite().tolist() == [[False, True, False, False, False, False]]


def test_min_p_decides_between_neighbouring_floats() -> None:
    """exp(x) >= min_p, for a min_p a hair on either side: the rounding of the threshold to fp32 must not decide."""
    x = -torch.rand(200, generator=torch.Generator().manual_seed(0)) * 5
    logits = torch.stack([torch.zeros(200), x], -1)
    limit = x.double().exp()
    assert apply_min_p(logits, limit * (1 - 1e-12))[:, 1].isfinite().all()
    assert not apply_min_p(logits, limit * (1 + 1e-12))[:, 1].isfinite().any()


def test_parameters_are_per_row_and_rows_do_not_notice_each_other() -> None:
    logits = rows(3000)
    k = torch.tensor([0, 1, -1, 40, 3000, 2999, 500, 128, 129])
    p = torch.tensor([0.5, 1.0, 0.9, 0.95, 0.99, 1.0, 0.1, 0.2, 0.7], dtype=torch.float64)
    for apply, values in ((apply_top_k, k), (apply_top_p, p), (apply_min_p, 1 - p), (apply_temperature, p * 2)):
        together = apply(logits, values)
        for row in range(9):
            assert torch.equal(together[row], apply(logits[row : row + 1], values[row].item())[0])


def test_masked_and_bad_rows_pass_through() -> None:
    usual = rows(300)[:1]
    masked = usual.clone()
    masked[0, 10:] = -INF
    logits = torch.cat([usual, masked, torch.full_like(usual, -INF), torch.full_like(usual, torch.nan), usual.clone()])
    logits[4, 7] = torch.nan
    for apply, value in ((apply_top_k, 20), (apply_top_p, 0.9), (apply_min_p, 0.2), (apply_temperature, 0.5)):
        found = apply(logits, value)
        assert torch.equal(found[:2], apply(logits[:2], value))
        assert found[1, 10:].eq(-INF).all()
        if apply is not apply_temperature:
            assert torch.equal(found[2:].nan_to_num(7.0), logits[2:].nan_to_num(7.0))
    assert torch.equal(apply_top_k(masked, 200), masked)


def test_input_is_neither_modified_nor_returned() -> None:
    logits = rows(640)
    before = logits.clone()
    active = ((apply_top_k, 3), (apply_top_p, 0.5), (apply_min_p, 0.5), (apply_temperature, 2.0))
    neutral = ((apply_top_k, 0), (apply_top_p, 1.0), (apply_min_p, 0.0), (apply_temperature, 1.0))
    for apply, value in active + neutral:
        found = apply(logits, value)
        assert torch.equal(logits, before)
        assert found.data_ptr() != logits.data_ptr()
    wide = torch.randn(9, 1280)
    assert torch.equal(apply_top_p(wide[:, ::2], 0.5), apply_top_p(wide[:, ::2].contiguous(), 0.5))


def test_greedy_temperature_leaves_the_row() -> None:
    logits = rows(10)
    assert torch.equal(apply_temperature(logits, 0.0), logits)
    assert torch.equal(apply_temperature(logits, 9.9e-6), logits)
    assert torch.equal(apply_temperature(logits, 1.1e-5), logits / torch.tensor(1.1e-5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: apply_temperature(x, -0.1), "temperature=-0.1 is refused: it must be finite and >= 0"),
        (lambda x: apply_temperature(x, torch.nan), "temperature=nan"),
        (lambda x: apply_temperature(x, torch.full((9,), INF)), "finite and >= 0"),
        (lambda x: apply_temperature(x, torch.ones(3)), r"a number per row, \[9\], not torch.float32 \[3\]"),
        (lambda x: apply_top_k(x, -2), "top_k=-2 is refused: it must be finite and >= -1"),
        (lambda x: apply_top_k(x, 1.5), "must be an integer"),
        (lambda x: apply_top_p(x, 0.0), r"top_p=0.0 is refused: it must be in \(0, 1\]"),
        (lambda x: apply_top_p(x, torch.full((9,), 1.01)), r"in \(0, 1\]"),
        (lambda x: apply_min_p(x, 1.5), r"min_p=1.5 is refused: it must be in \[0, 1\]"),
        (lambda x: apply_min_p(x[0], 0.5), r"shape \[B, V\]"),
        (lambda x: apply_top_k(x.long(), 5), "floating point"),
        (lambda x: apply_top_k(x[:, :0], 5), "V >= 1"),
    ],
)
def test_errors_name_what_is_allowed(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(rows(10))  # type: ignore[operator]

"""The most probable tokens, exactly ordered, with their log-probs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import logits as book

from pagefork.kernels import top_logprobs
from pagefork.kernels.scratch import Scratch, widened
from pagefork.kernels.top_logprobs import token_rank

pytestmark = pytest.mark.usefixtures("read_by")


def rows(vocab: int) -> torch.Tensor:
    """Usual rows, rows full of ties, rows full of -inf, a constant row."""
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1] = (logits[1] * 2).round()
    logits[2] = logits[2].sign() * 0.0  # 0.0 and -0.0 tie
    logits[3, torch.arange(vocab) % 5 > 0] = -torch.inf
    logits[4] = (logits[4] * 40).bfloat16()
    logits[5, :-1] = -torch.inf
    logits[6] *= 1e37
    return logits


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 999, 4097])
def test_order_is_by_value_then_id(vocab: int) -> None:
    logits = rows(vocab)
    order = np.stack([np.lexsort((np.arange(vocab), -row)) for row in logits.double().numpy()])
    for n in {1, 2, 5, 20, 64, 700, vocab - 1, vocab, vocab + 3}:
        ids, logprobs = top_logprobs(logits, n)
        m = min(n, vocab)
        assert (ids[:, :m].numpy() == order[:, :m]).all()
        assert (ids[:, m:] == -1).all() and (logprobs[:, m:] == -torch.inf).all()
        for row, found in zip(logits.numpy(), logprobs[:, :m].numpy(), strict=True):
            np.testing.assert_allclose(found, np.sort(book.log_softmax(row))[::-1][:m], rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-5), (torch.float16, 2e-5)])
def test_log_probs_of_wide_rows_are_accurate(dtype: torch.dtype, bound: float) -> None:
    """Against float64 on the same inputs; flat rows are where fp32 sums would drift."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 151_936, generator=generator) * torch.tensor([1e-3, 1.0, 6.0])[:, None]).to(dtype)
    ids, logprobs = top_logprobs(logits, 50)
    expected = logits.double().log_softmax(-1).gather(-1, ids)
    assert (logprobs - expected).abs().max() < bound


def test_rank_counts_the_strictly_better() -> None:
    logits = rows(999)
    token = torch.tensor([3, 5, 7, 0, 99, 998, 6])
    found = token_rank(widened(logits, Scratch()), token, Scratch())
    assert found.tolist() == [1 + int((row > row[t]).sum()) for row, t in zip(logits, token, strict=True)]


def test_no_row_notices_another() -> None:
    logits = rows(4097)
    logits[2, 50] = torch.nan
    together = top_logprobs(logits, 30)
    for row in (0, 1, 3, 4, 5, 6):
        alone = top_logprobs(logits[row : row + 1], 30)
        assert torch.equal(alone.ids[0], together.ids[row]) and torch.equal(alone.logprobs[0], together.logprobs[row])


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="n=-1 is refused"):
        top_logprobs(torch.zeros(1, 5), -1)
    assert top_logprobs(torch.zeros(2, 5), 0).ids.shape == (2, 0)

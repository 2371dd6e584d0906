"""No n-gram occurs twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import logits as book
from transformers import NoRepeatNGramLogitsProcessor

from pagefork.kernels import ban_repeated_ngrams


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 4, 30])
def test_bans_equal_hugging_face(size: int, length: int) -> None:
    rng = np.random.default_rng(size * 100 + length)
    tokens, logits = torch.from_numpy(rng.integers(0, 3, (100, length))), torch.randn(100, 5)
    expected = NoRepeatNGramLogitsProcessor(size)(tokens, logits.clone())  # type: ignore[no-untyped-call]
    assert torch.equal(ban_repeated_ngrams(logits, tokens, torch.full((100,), length), size), expected)


def test_sizes_and_lengths_are_per_row() -> None:
    rng = np.random.default_rng(5)
    tokens, length, size = rng.integers(0, 3, (300, 20)), rng.integers(0, 21, 300), rng.integers(0, 5, 300)
    size[:2], length[:2] = 40, (20, 0)  # an n-gram longer than any history
    logits = rng.normal(size=(300, 6)).astype(np.float32)
    found = ban_repeated_ngrams(*map(torch.from_numpy, (logits, tokens, length, size)))
    for row in range(300):
        bans = book.banned(tokens[row, : length[row]].tolist(), 6, 0, {"no_repeat_ngram_size": int(size[row])})
        assert set(found[row].eq(-torch.inf).nonzero()[:, 0].tolist()) == bans


def test_no_history_bans_nothing() -> None:
    logits = torch.randn(2, 5)
    for columns in (0, 3):
        tokens = torch.zeros(2, columns, dtype=torch.int32)
        assert torch.equal(ban_repeated_ngrams(logits, tokens, torch.zeros(2, dtype=torch.long), 2), logits)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="n-gram size=-1 is refused: it must be finite and >= 0"):
        ban_repeated_ngrams(torch.zeros(1, 5), torch.zeros(1, 3, dtype=torch.int32), torch.tensor([3]), -1)

"""Banned tokens are -inf, the others untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import NoBadWordsLogitsProcessor

from pagefork.kernels import allow_tokens, ban_tokens, ban_words

INF = torch.inf


def flat(words: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, token and distance from the end, for the words of every row."""
    items = [(row, token, back) for row, own in enumerate(words) for word in own for back, token in enumerate(reversed(word))]
    return tuple(torch.tensor(items, dtype=torch.long).reshape(-1, 3).T)  # type: ignore[return-value]


def test_bans_and_permissions_are_complements() -> None:
    logits = torch.randn(3, 20)
    row, token = torch.tensor([0, 0, 2]), torch.tensor([3, 19, 0])
    banned, allowed = ban_tokens(logits, row, token), allow_tokens(logits, row, token)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[row, token] = True
    assert torch.equal(banned, logits.masked_fill(mask, -INF))
    assert torch.equal(allowed[[0, 2]], logits.masked_fill(~mask, -INF)[[0, 2]])
    assert torch.equal(allowed[1], logits[1])
    same = logits.clone()
    assert torch.equal(allow_tokens(same, row, token, out=same), allowed)


def test_words_equal_hugging_face() -> None:
    """HF's processor bans the last token where the tokens before it match; one list of words for all rows."""
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 4, size).tolist() for size in (1, 2, 2, 3, 3, 4, 9)]
    for length in (1, 2, 3, 8):
        tokens = torch.from_numpy(rng.integers(0, 4, (200, length)))
        logits = torch.randn(200, 4)
        expected = NoBadWordsLogitsProcessor(words)(tokens, logits.clone())  # type: ignore[no-untyped-call]
        found = ban_words(logits, tokens, torch.full((200,), length), *flat([words] * 200))
        assert torch.equal(found, expected)


def test_words_are_matched_at_the_end_of_each_rows_own_history() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [9, 9, 9, 9]], dtype=torch.int32)
    length = torch.tensor([2, 4, 1, 0])
    words = [[[1, 2, 7], [2, 2, 8]], [[1, 2, 7], [3, 4, 5], [6]], [[1, 1], [0, 1, 2]], [[9, 3], [4]]]
    found = ban_words(torch.zeros(4, 10), tokens, length, *flat(words))
    assert [row.eq(-INF).nonzero()[:, 0].tolist() for row in found] == [[7], [5, 6], [1], [4]]


def test_words_without_history_or_without_words() -> None:
    logits, none = torch.randn(2, 10), torch.empty(2, 0, dtype=torch.int32)
    found = ban_words(logits, none, torch.zeros(2, dtype=torch.long), *flat([[[3]], [[1, 2]]]))
    assert found.eq(-INF).nonzero().tolist() == [[0, 3]]
    assert torch.equal(ban_words(logits, none, torch.zeros(2, dtype=torch.long), *flat([[], []])), logits)


def test_errors_name_what_is_allowed() -> None:
    logits, one = torch.zeros(2, 5), torch.tensor([1])
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 5\)"):
        ban_tokens(logits, one, one * 7)
    with pytest.raises(ValueError, match="parallel vectors"):
        allow_tokens(logits, one, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="a word begins with its last token"):
        ban_words(logits, torch.zeros(2, 3, dtype=torch.int32), torch.tensor([3, 3]), one, one, one)

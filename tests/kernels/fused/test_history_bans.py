"""N-grams and words ban, for one draw, the tokens that a plain reading of the history bans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import logits as book

from pagefork.kernels.history_bans import SCANNED, ban_repeats, ban_word_ends
from pagefork.kernels.token_table import TokenTable, new_table

VOCAB = 200


def bans(table: TokenTable) -> list[dict[int, int]]:
    """Of each slot the banned tokens and the position of the draw that may not take them."""
    cells = table.cells.cpu().numpy()
    return [{int(key) - 1: int(at) for key, _, _, at in slot[slot[:, 3] > 0]} for slot in cells]


def matrix(histories: list[list[int]], device: torch.device) -> torch.Tensor:
    """Histories as rows; what lies past their ends is random."""
    width = max(map(len, histories)) + 3
    values = np.random.default_rng(0).integers(0, VOCAB, (len(histories), width)).astype(np.int32)
    for row, history in zip(values, histories, strict=True):
        row[: len(history)] = history
    return torch.from_numpy(values).to(device)


def test_ngrams_are_not_repeated(device: torch.device) -> None:
    rng = np.random.default_rng(1)
    lengths = [1, 2, 3, 7, 40, SCANNED - 1, SCANNED, SCANNED + 1, 2 * SCANNED + 9, 60, 60, 60]
    histories = [rng.integers(0, 3 if length < 60 else 12, length).tolist() for length in lengths]
    sizes = [1, 2, 3, 2, 4, 3, 3, 2, 1, 60, 61, 5]
    rows = rng.permutation(len(lengths))
    table = new_table(len(lengths), 256, VOCAB, device)
    records = np.stack((np.arange(len(lengths)), rows, lengths, sizes), 1).astype(np.int32)
    history = matrix([histories[p] for p in np.argsort(rows).tolist()], device)
    ban_repeats(table, history, torch.from_numpy(records).to(device), max(lengths))
    expected = [
        dict.fromkeys(book.banned(history, VOCAB, 0, {"no_repeat_ngram_size": n}), len(history))
        for history, n in zip(histories, sizes, strict=True)
    ]
    assert bans(table) == expected and sum(map(len, expected)) > 20


def test_words_are_not_completed(device: torch.device) -> None:
    rng = np.random.default_rng(2)
    histories = [rng.integers(0, 3, length).tolist() for length in (1, 2, 3, 5, 20, 20)]
    table, banned = new_table(6, 64, VOCAB, device), list[dict[int, int]]()
    records, tokens = list[list[int]](), list[int]()
    for slot, history in enumerate(histories):
        words = [tuple(rng.integers(0, 3, size).tolist()) for size in rng.integers(2, 5, 15)]
        words += [(*history, 150), (1, *history, 151), (*history[-3:], 152)]
        words = [word for word in words if len(word) > 1]
        banned.append(dict.fromkeys(book.banned(history, VOCAB, 0, {"bad_words": words}), len(history)))
        for word in words:
            records.append([slot, slot, len(history), len(tokens), len(word)])
            tokens += reversed(word)
    given = (torch.tensor(values, dtype=torch.int32, device=device) for values in (records, tokens))
    ban_word_ends(table, matrix(histories, device), *given)
    assert bans(table) == banned and sum(map(len, banned)) > 8


def test_the_next_draw_does_not_mind_the_last_ones_bans(device: torch.device) -> None:
    table = new_table(1, 64, VOCAB, device)
    history = torch.tensor([[5, 6, 5, 6, 5]], dtype=torch.int32, device=device)
    for length, expected in ((3, {6: 3}), (4, {6: 3, 5: 4}), (5, {6: 5, 5: 4})):
        ban_repeats(table, history, torch.tensor([[0, 0, length, 2]], dtype=torch.int32, device=device), length)
        assert bans(table) == [expected]


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    table, ints = new_table(1, 64, VOCAB, device), torch.zeros(2, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="history"):
        ban_repeats(table, ints.long(), ints, 0)
    with pytest.raises(ValueError, match="records"):
        ban_word_ends(table, ints, ints, ints[0])

"""The tables that TokenMarks keeps say what the specs and histories of slots say, however these came about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from support.adjusting import entries, values
from support.sampling import VOCAB, opens, random_spec, rows

from pagefork import token_marks as module
from pagefork.scheduler.plan import Forks, Spec, ints
from pagefork.token_marks import TokenMarks

SLOTS = 6


class Slots:
    """TokenMarks and the histories that it should know of."""

    def __init__(self, device: torch.device) -> None:
        self.marks = TokenMarks(SLOTS, VOCAB, device)
        self.specs: dict[int, dict[str, Any]] = {}
        self.histories: dict[int, list[int]] = {}
        self.device = device

    def open(self, given: dict[int, tuple[dict[str, Any], list[int]]]) -> None:
        """A spec and a history each."""
        specs = [Spec(**spec) for spec, _ in given.values()]
        self.marks.open(
            opens(list(given), [tokens if spec.history else [] for spec, (_, tokens) in zip(specs, given.values(), strict=True)]),
            specs,
        )
        for slot, (spec, tokens) in given.items():
            self.specs[slot], self.histories[slot] = spec, list(tokens)

    def feed(self, given: dict[int, tuple[int, list[int]]]) -> None:
        """Where it starts and tokens each."""
        starts = [start for start, _ in given.values()]
        batch, tokens = rows(list(given), starts, [tokens for _, tokens in given.values()])
        self.marks.feed(batch, tokens.to(self.device))
        for slot, (start, fed) in given.items():
            self.histories[slot][start:] = fed + self.histories[slot][start + len(fed) :]

    def fork(self, src: list[int], dst: list[int]) -> None:
        self.marks.fork(Forks(ints(src), ints(dst), np.zeros(len(src), np.int64)))
        read = [(self.specs[slot], list(self.histories[slot])) for slot in src]
        for slot, (spec, tokens) in zip(dst, read, strict=True):
            self.specs[slot], self.histories[slot] = spec, tokens

    def check(self) -> None:
        """Adjusted rows of all slots are those of the book."""
        slot = list(self.specs)
        length = [len(self.histories[s]) for s in slot]
        history = np.zeros((SLOTS, max(length)), np.int32)
        for s, tokens in self.histories.items():
            history[s, : len(tokens)] = tokens
        words = [
            (p, token, back)
            for p, s in enumerate(slot)
            for word in self.specs[s].get("bad_words", ())
            for back, token in enumerate(reversed(word))
        ]
        items = np.array([word[1:] for word in words], [("token", np.int64), ("back", np.int64)])
        ngram = np.array([self.specs[s].get("no_repeat_ngram_size", 0) for s in slot])
        device_history = torch.from_numpy(history).to(self.device)
        index = np.array([word[0] for word in words], np.int64)
        self.marks.ban_step(ints(slot), np.array(length) - 1, device_history, ngram, (index, items))
        logits = torch.from_numpy(3 * np.random.default_rng(0).normal(size=(len(slot), VOCAB)).astype(np.float32))
        given = entries([self.specs[s] for s in slot], self.marks.row[slot].tolist(), length, self.device)
        found = logits
        if self.marks.table is not None:
            found = values(logits.to(self.device), given, self.marks.table).cpu()
            for s in slot:
                row = int(self.marks.row[s])
                used = int((self.marks.table.cells[row, :, 0] > 0).sum()) if row >= 0 else 0
                assert used <= self.marks.most(ints([s])) and 2 * used <= max(self.marks.table.cells.shape[1], 2 * VOCAB)
        for p, s in enumerate(slot):
            tokens, spec = self.histories[s], self.specs[s]
            assert (found[p].numpy() == book.adjusted(logits[p].numpy(), tokens, spec["prompt_len"], spec)).all(), (s, spec)


@pytest.mark.parametrize("seed", range(2))
def test_random_lives_of_slots_leave_what_the_book_says(seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_CELLS", 16)
    monkeypatch.setattr(module, "_FIRST_ROWS", 1)
    rng = np.random.default_rng(seed)
    slots = Slots(device)
    for step in range(12):
        if step and rng.random() < 0.6:
            live = list(slots.specs)
            dst = rng.permutation(SLOTS)[: rng.integers(1, SLOTS)].tolist()
            slots.fork(rng.choice(live, len(dst)).tolist(), dst)
        fresh = rng.permutation(SLOTS)[: rng.integers(1, 3)].tolist() if step < 2 or rng.random() < 0.5 else []
        given = {}
        for slot in fresh:
            tokens = rng.integers(0, 6, rng.integers(1, 15)).tolist()
            given[slot] = {**random_spec(rng, tokens), "end_ids": (0, 70)}, tokens
        if given:
            slots.open(given)
        fed: dict[int, tuple[int, list[int]]] = {}
        for slot, tokens in slots.histories.items():
            if slot in fresh:  # fed again, a part at least, and perhaps a token more
                start = int(rng.integers(0, len(tokens)))
                fed[slot] = start, tokens[start:] + rng.integers(0, VOCAB, rng.integers(0, 2)).tolist()
            elif rng.random() < 0.8:
                fed[slot] = len(tokens), rng.integers(0, VOCAB, rng.integers(1, 3)).tolist()
        if fed:
            slots.feed(fed)
        slots.check()


def test_a_prompt_in_parts_counts_once(device: torch.device) -> None:
    slots = Slots(device)
    spec = {"prompt_len": 6, "repetition_penalty": 1.5, "frequency_penalty": 0.5}
    prompt = [1, 2, 1, 3, 1, 2]
    slots.open({0: (spec, prompt), 1: (spec, [])})
    for start in (0, 2, 4):
        slots.feed(dict.fromkeys((0, 1), (start, prompt[start : start + 2])))
    slots.check()
    slots.feed({0: (6, [2]), 1: (6, [90])})
    slots.check()


def test_slots_that_need_no_table_have_no_row(device: torch.device) -> None:
    slots = Slots(device)
    slots.open({0: ({"prompt_len": 2, "min_tokens": 0, "end_ids": (3,)}, [1, 2])})
    slots.feed({0: (0, [1, 2])})
    assert slots.marks.table is None and slots.marks.row.tolist() == [-1] * SLOTS and slots.marks.most(ints([0])) == 0
    slots.open({1: ({"prompt_len": 2, "logit_bias": ((3, 1.0),)}, [1, 2])})
    slots.fork([1, 0], [0, 1])
    assert (slots.marks.row >= 0).tolist() == [True] + [False] * 5
    slots.check()


def test_rows_are_used_again(device: torch.device) -> None:
    slots = Slots(device)
    for round_ in range(10):
        slots.open(
            {slot: ({"prompt_len": 1, "logit_bias": ((slot + round_, 1.0),)}, [1]) for slot in (round_ % 5, round_ % 5 + 1)}
        )
    slots.check()
    assert int(slots.marks.row.max()) < SLOTS


def test_frequency_alone_leaves_the_prompt_alone(device: torch.device) -> None:
    slots = Slots(device)
    slots.open({0: ({"prompt_len": 3, "frequency_penalty": 0.5}, [1, 2, 3, 4])})
    slots.feed({0: (0, [1, 2, 3, 4, 5])})
    slots.check()
    assert slots.marks.table is not None
    assert sorted(slots.marks.table.cells[0, :, 0].tolist())[-3:] == [0, 5, 6]

"""Lists by slot behave like a dictionary of lists, however often they are replaced and copied."""

from __future__ import annotations

import numpy as np

from pagefork.ragged import Ragged

SLOTS = 12


def test_lists_equal_a_dictionary_under_random_edits() -> None:
    rng = np.random.default_rng(0)
    lists, model = Ragged(SLOTS, np.int64), {slot: [] for slot in range(SLOTS)}
    for _ in range(2000):
        if rng.random() < 0.5:
            slot, items = int(rng.integers(SLOTS)), rng.integers(0, 99, rng.choice([0, 1, 5, 40]))
            lists.set(slot, items)
            model[slot] = items.tolist()
        else:
            order = rng.permutation(SLOTS)
            src, dst = order[: SLOTS // 2], order[: SLOTS // 2][::-1].copy()  # each reads what another writes
            lists.copy(src, dst)
            model |= {int(to): model[int(source)] for source, to in zip(src, dst, strict=True)}
        slots, wanted = rng.integers(0, SLOTS, 5), rng.random(5) < 0.7
        row, items = lists.gather(slots)
        assert [(r, i) for r, i in zip(row.tolist(), items.tolist(), strict=True)] == [
            (r, i) for r, slot in enumerate(slots.tolist()) for i in model[slot]
        ]
        assert lists.gather(slots, wanted)[1].tolist() == [
            i for want, slot in zip(wanted, slots.tolist(), strict=True) if want for i in model[slot]
        ]


def test_replaced_lists_give_their_memory_back() -> None:
    lists = Ragged(SLOTS, np.int64)
    for slot in range(SLOTS):
        lists.set(slot, np.arange(10))
    lists.copy(np.zeros(SLOTS, np.int64), np.arange(SLOTS))
    for _ in range(1000):
        lists.set(3, np.arange(100))
    assert len(lists._items) <= 2 * (10 + 100)
    assert lists.gather(np.array([0, 11]))[1].tolist() == [*range(10), *range(10)]

"""Tasks cover what tokens see, once each, and say right where partial results go."""

from __future__ import annotations

import numpy as np
import pytest

from pagefork.kernels.attention_tasks import Tasks, plan_tasks

SPLIT = 8


def pairs(tasks: Tasks, positions: list[int], slots: list[int], window: int | None) -> dict[tuple[int, int], list[int]]:
    """Of every (token, key) that some task multiplies and that is visible: the slots whose table is walked."""
    found: dict[tuple[int, int], list[int]] = {}
    for first, tokens, slot, begin, end, whole in tasks.records.tolist():
        assert tokens >= 1 and begin < end and (whole or begin // SPLIT == (end - 1) // SPLIT)
        for token in range(first, first + tokens):
            for key in range(begin, end):
                if positions[token] - (window or 1 << 30) < key <= positions[token]:
                    found.setdefault((token, key), []).append(slot)
    return found


def random_rows(rng: np.random.Generator, rows: int) -> tuple[list[int], list[int], list[tuple[int, int, int]], list[int]]:
    """Starts, lengths, runs that share blocks of 4, and the keys that a row shares with the run that it is in."""
    start = rng.choice([0, 1, 7, 8, 9, 15, 16, 40, 63], rows).tolist()
    length = [int(rng.choice([1, 1, 1, 2, 5, 9, 20])) for _ in range(rows)]
    trunk, shared, first = [], [0] * rows, 0
    while first < rows:
        count = int(rng.integers(1, 5))
        blocks = int(rng.integers(0, 14))
        count = min(count, rows - first)
        if rng.random() < 0.7:
            trunk.append((first, count, blocks))
            shared[first : first + count] = [4 * blocks] * count
        first += count
    return start, length, trunk, shared


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 8, 20])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_every_visible_key_of_every_token_is_multiplied_once(
    group: int, window: int | None, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagefork.kernels.attention_tasks._WHOLE_HEIGHT", 16 * group)
    rng = np.random.default_rng(group)
    wholes = several = 0
    for _ in range(40):
        start, length, trunk, shared = random_rows(rng, int(rng.integers(1, 9)))
        rows = len(start)
        slot = rng.permutation(20)[:rows]
        tasks = plan_tasks(
            slot.astype(np.int32),
            np.array(start, np.int32),
            np.array(length, np.int32),
            np.array(trunk, np.int32).reshape(-1, 3),
            group=group,
            block_size=4,
            window=window,
            invariant=invariant,
            split=SPLIT,
        )
        assert tasks.records.dtype == tasks.part.dtype == np.int32 and tasks.rows >= 16
        row = np.repeat(np.arange(rows), length).tolist()
        positions = [x + i for x, n in zip(start, length, strict=True) for i in range(n)]
        assert (tasks.records[:, 1] <= tasks.rows // group).all()
        found = pairs(tasks, positions, slot[row].tolist(), window)
        low = [max(0, x - window + 1) if window else 0 for x in positions]
        assert found.keys() == {(t, key) for t, x in enumerate(positions) for key in range(low[t], x + 1)}
        for (token, key), walked in found.items():
            same = {slot[row[token]]}
            for first, count, _ in trunk:
                if first <= row[token] < first + count and key < min(shared[row[token]], *start[first : first + count]):
                    same |= set(slot[first : first + count].tolist())
            assert len(walked) == 1 and walked[0] in same
        whole = {t for first, count, *_, alone in tasks.records.tolist() if alone for t in range(first, first + count)}
        splits = [1 if t in whole else x // SPLIT - low[t] // SPLIT + 1 for t, x in enumerate(positions)]
        parts = [count if count > 1 else 0 for count in splits]
        assert np.diff(tasks.part).tolist() == parts and tasks.part[0] == 0
        wholes, several = wholes + len(whole), several + (max(parts) > 1)
    assert wholes and (several or window == 1)


def test_a_run_walks_once_through_the_splits_that_it_shares() -> None:
    rows = 8
    start, length, slot = np.full(rows, 70, np.int32), np.ones(rows, np.int32), np.arange(rows, dtype=np.int32)
    given = {"group": 4, "block_size": 4, "split": SPLIT}
    together = plan_tasks(slot, start, length, np.array([[0, rows, 15]], np.int32), **given)
    apart = plan_tasks(slot, start, length, np.empty((0, 3), np.int32), **given)
    assert len(apart.records) == rows * 9  # splits that 71 keys touch
    assert len(together.records) == 7 + rows * 2  # 7 whole splits are in 60 keys that all share
    assert np.array_equal(together.part, apart.part) and together.rows == apart.rows


def test_tiles_of_single_tokens_are_as_high_in_every_step_and_invariant_ones_in_all() -> None:
    def rows(length: list[int], invariant: bool) -> int:
        count = len(length)
        nothing = np.zeros(count, np.int32)
        trunk = np.empty((0, 3), np.int32)
        return plan_tasks(nothing, nothing, np.array(length), trunk, group=4, block_size=16, invariant=invariant).rows

    assert len({rows([1] * count, False) for count in (1, 3, 300)}) == 1
    assert rows([1], False) < rows([1, 20], False) < rows([1000], False)
    assert len({rows(length, True) for length in ([1], [1, 20], [1000])}) == 1

"""A token table holds what a dictionary per slot would hold, whatever was done in whatever order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pagefork.kernels.token_cells import State
from pagefork.kernels.token_table import TokenTable, clear, fork, grown, mark, new_table, reference_mark

VOCAB = 999


class Cell(NamedTuple):
    state: int = 0
    bias: float = 0.0
    banned_at: int = 0


Slot = dict[int, Cell]


def held(table: TokenTable) -> list[Slot]:
    """What the slots hold; checks bits, touched groups and that every token is where a search finds it."""
    cells, bits, touched, count = (part.cpu().numpy() for part in table)
    found: list[Slot] = []
    for s in range(len(cells)):
        used = cells[s][cells[s, :, 0] > 0]
        slot = {
            int(key) - 1: Cell(int(state), bias, int(at)) for (key, state, _, at), bias in zip(used, floats(used), strict=True)
        }
        assert len(slot) == len(used), "a token has two cells"
        words = np.unpackbits(bits[s].view(np.uint8), bitorder="little").nonzero()[0]
        assert sorted(slot) == words.tolist()
        assert sorted(touched[s, : count[s]]) == sorted({token // 64 for token in slot})
        for token in slot:
            place = first(token, cells.shape[1])
            while cells[s, place, 0] != token + 1:
                assert cells[s, place, 0] > 0, "a free cell before the token's"
                place = (place + 1) % cells.shape[1]
        found.append(slot)
    return found


def floats(cells: NDArray[np.int32]) -> list[float]:
    bias: list[float] = np.ascontiguousarray(cells[:, 2]).view(np.float32).tolist()
    return bias


def first(token: int, capacity: int) -> int:
    return (token * 2654435769 % 2**32) * capacity >> 32


def noted(slots: list[Slot], given: dict[str, NDArray[np.generic]]) -> None:
    """`mark` on dictionaries."""
    for slot, token, state, bias, banned_at in zip(*(values.tolist() for values in given.values()), strict=True):
        if slot >= 0 and token >= 0:
            old = slots[slot].get(token, Cell())
            count = (old.state & State.COUNT) + (state & State.COUNT)
            flags = (old.state | state) & ~State.COUNT
            slots[slot][token] = Cell(count | flags, bias or old.bias, max(banned_at, 0) or old.banned_at)


def tensors(given: dict[str, NDArray[np.generic]], device: torch.device) -> list[torch.Tensor]:
    return [torch.from_numpy(values).to(device) for values in given.values()]


def random_marks(rng: np.random.Generator, slots: int, count: int, vocab: int) -> dict[str, NDArray[np.generic]]:
    """Repeats included; the bias and the ban of a pair are the same wherever it occurs."""
    slot, token = rng.integers(-1, slots, count).astype(np.int32), rng.integers(-1, vocab, count)
    word = rng.integers(0, 5, vocab + 1)[token]
    flags = rng.choice([0, State.PROMPT, State.BANNED, State.END, State.ALLOWED], count)
    return {
        "slot": slot,
        "token": token.astype(np.int32 if rng.random() < 0.5 else np.int64),
        "state": (flags + rng.integers(0, 3, count)).astype(np.int32),
        "bias": np.where(word == 0, np.float32(token + 0.5), 0).astype(np.float32),
        "banned_at": np.where(word == 1, rng.integers(1, 100), 0).astype(np.int32),
    }


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_leave_what_dictionaries_would_hold(seed: int, device: torch.device) -> None:
    rng = np.random.default_rng(seed)
    table, slots = new_table(4, 64, VOCAB, device), [Slot() for _ in range(4)]
    for _ in range(12):
        kind = rng.choice(["mark", "mark", "mark", "clear", "fork", "grow"])
        if kind == "mark":
            given = random_marks(rng, len(slots), int(rng.choice([1, 2, 31, 33, 90])), int(rng.choice([20, VOCAB])))
            mark(table, *tensors(given, device))
            noted(slots, given)
        elif kind == "clear":
            gone = rng.permutation(len(slots))[: rng.integers(1, 3)]
            clear(table, torch.from_numpy(gone).to(device))
            for slot in gone.tolist():
                slots[slot] = {}
        elif kind == "fork":  # destinations may be sources
            dst = rng.permutation(len(slots))[: rng.integers(1, len(slots))]
            src = rng.integers(0, len(slots), len(dst))
            fork(table, *(torch.from_numpy(index).to(device) for index in (src, dst)))
            read = [dict(slots[slot]) for slot in src.tolist()]
            for slot, copied in zip(dst.tolist(), read, strict=True):
                slots[slot] = copied
        if kind == "grow" or max(map(len, slots)) > table.cells.shape[1] // 2:
            more = int(rng.integers(0, 2))
            table = grown(table, len(slots) + more, table.cells.shape[1] * int(rng.choice([1, 2, 4])))
            slots += [Slot() for _ in range(more)]
        assert held(table) == slots


def test_repeats_in_one_call_count_each_time(device: torch.device) -> None:
    table = new_table(2, 16, 100, device)
    slot = torch.zeros(1000, dtype=torch.int32, device=device)
    token = torch.arange(1000, device=device) % 3 * 33
    mark(table, slot, token, torch.ones_like(slot))
    assert held(table) == [{0: Cell(334), 33: Cell(333), 66: Cell(333)}, {}]


def test_tokens_with_one_first_place_form_a_run(device: torch.device) -> None:
    """Of 64 tokens the last is 63 cells from where its search begins, round the end of the table."""
    capacity, vocab = 128, 40000
    place = [first(token, capacity) for token in range(vocab)]
    token = [token for token in range(vocab) if place[token] == capacity - 20][:64]
    assert len(token) == 64
    table = new_table(1, capacity, vocab, device)
    given = torch.tensor(token, device=device)
    for _ in range(2):
        mark(table, torch.zeros(64, dtype=torch.int32, device=device), given, torch.ones(64, dtype=torch.int32, device=device))
    assert held(table) == [dict.fromkeys(token, Cell(2))]


def test_a_full_slot_drops_new_tokens_and_keeps_the_old(device: torch.device) -> None:
    table = new_table(2, 16, 100, device)
    slot = torch.zeros(40, dtype=torch.int32, device=device)
    token = torch.arange(40, dtype=torch.int32, device=device)
    mark(table, slot, token, torch.ones_like(slot))
    kept = set(held(table)[0])
    assert len(kept) == 16
    mark(table, slot, token, torch.ones_like(slot))
    assert held(table) == [dict.fromkeys(kept, Cell(2)), {}]


def test_tokens_in_any_pattern_are_found_within_few_steps() -> None:
    """At half load: ids in a row, at a distance, and at random."""
    rng = np.random.default_rng(0)
    for capacity in (64, 1024, 8192):
        half = capacity // 2
        patterns = [np.arange(half) * step + rng.integers(0, 1000) for step in (1, 2, 3, 64, 100, 1000, 1024)]
        patterns += [rng.permutation(128000)[:half], np.unique((rng.pareto(1.0, 2 * half) * 100).astype(np.int64))[:half]]
        for tokens in patterns:
            taken = np.zeros(capacity, bool)
            steps = []
            for token in tokens.tolist():
                place = first(token, capacity)
                steps.append(1)
                while taken[place]:
                    place = (place + 1) % capacity
                    steps[-1] += 1
                taken[place] = True
            assert np.mean(steps) < 2.5


@pytest.mark.parametrize("seed", range(2))
def test_the_reference_agrees(seed: int, device: torch.device) -> None:
    rng = np.random.default_rng(seed)
    tables = new_table(3, 256, VOCAB, device), new_table(3, 256, VOCAB, torch.device("cpu"))
    for _ in range(3):
        given = random_marks(rng, 3, 70, VOCAB)
        mark(tables[0], *tensors(given, device))
        reference_mark(tables[1], *tensors(given, torch.device("cpu")))
    assert held(tables[0]) == held(tables[1])


def test_no_split_into_calls_changes_what_is_held(device: torch.device) -> None:
    given = random_marks(np.random.default_rng(5), 3, 150, VOCAB)
    together, apart = new_table(3, 256, VOCAB, device), new_table(3, 256, VOCAB, device)
    mark(together, *tensors(given, device))
    for cut in (slice(0, 1), slice(1, 100), slice(100, 150)):
        mark(apart, *tensors({name: values[cut] for name, values in given.items()}, device))
    assert held(together) == held(apart)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="power of two"):
        new_table(1, 100, VOCAB, device)
    table, ints = new_table(1, 16, VOCAB, device), torch.zeros(3, dtype=torch.int32, device=device)
    for wrong in (
        {"slot": ints.long()},
        {"state": ints[:2]},
        {"token": ints.float()},
        {"bias": ints},
        {"banned_at": ints.float()},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mark(table, **{"slot": ints, "token": ints, "state": ints, **wrong})

"""Similarities read off pages by the kernel equal the largest cosines in float64, whoever else is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagefork.kernels._triton import INTERPRETED
from pagefork.kernels.similarity import similarity, unit, write_states
from pagefork.kernels.similarity_tiles import ROWS, TOKENS, plan

HALVES = [torch.bfloat16, torch.float16]


class Held:
    """Sequences on pages that are full of NaN and of large numbers but for what was written, in any order of blocks."""

    def __init__(self, size: int, width: int, dtype: torch.dtype, device: torch.device, blocks: int = 300) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.generator = torch.Generator().manual_seed(size * width)
        junk = torch.randn(blocks, size, width, generator=self.generator) * 1000
        junk[torch.rand(blocks, size, generator=self.generator) < 0.5] = torch.nan
        self.pages = junk.to(device, dtype)
        self._free = (torch.randperm(blocks - 1, generator=self.generator) + 1).tolist()

    def random(self, count: int) -> Tensor:
        states = torch.randn(count, self.pages.shape[2], generator=self.generator) * 5
        return states.to(self.device, self.dtype)

    def table(self, columns: int, like: Tensor | None = None, same: int = 0) -> Tensor:
        """A table of fresh blocks but for the first `same` ones of `like`."""
        fresh = torch.tensor([self._free.pop() for _ in range(columns - same)], dtype=torch.long)
        return fresh if like is None else torch.cat((like[:same], fresh))

    def fill(self, table: Tensor, begin: int, end: int) -> None:
        place = torch.arange(begin, end)
        blocks, offsets = (index.to(self.device) for index in (table[place // self.size], place % self.size))
        self.pages[blocks, offsets] = unit(self.random(end - begin)).to(self.dtype)

    def expected(self, query: Tensor, table: Tensor, position: int, window: int) -> float:
        place = torch.arange(max(0, position - window) if window else 0, position)
        if not len(place):
            return -1.0
        earlier = self.pages.cpu()[table[place // self.size], place % self.size].double()
        query = query.cpu().double()
        return min(1.0, float((earlier @ query / query.norm()).max()))


def check(held: Held, queries: Tensor, tables: Tensor, position: list[int], window: list[int]) -> Tensor:
    found = similarity(queries, held.pages, tables, torch.tensor(position), torch.tensor(window))
    expected = [held.expected(*entry) for entry in zip(queries, tables, position, window, strict=True)]
    torch.testing.assert_close(found.cpu(), torch.tensor(expected), atol=2e-6, rtol=0)
    return found


@pytest.mark.parametrize(
    ("size", "width", "dtype"),
    [
        (16, 16, torch.bfloat16),
        (16, 576, torch.float16),
        (16, 576, torch.bfloat16),
        (8, 48, torch.float32),
        (40, 48, torch.float16),
        (128, 16, torch.float32),
        (7, 33, torch.bfloat16),
    ],
    ids=str,
)
def test_it_is_the_largest_cosine_to_an_earlier_position(size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Positions at edges of blocks and of tiles, windows that end within either, and none before position 0."""
    held = Held(size, width, dtype, device)
    position = [0, 1, size - 1, size, size + 1, 2 * size, TOKENS, TOKENS + 1, 3 * size + 2]
    tables = torch.stack([held.table(4 + TOKENS // size) for _ in position])
    for table, end in zip(tables, position, strict=True):
        held.fill(table, 0, end)
    found = check(held, held.random(len(position)), tables, position, [0, 1, 0, 0, 1, 0, 0, 0, 0])
    assert found[0] == -1
    windows = [1, 0, size - 2, size, 2, size - 1, TOKENS - 1, 5, size + 3]
    found = check(held, held.random(len(position)), tables, position, windows)
    assert found[0] == -1


@pytest.mark.parametrize(
    ("candidates", "dtype"), [(2, torch.float32), (5, torch.bfloat16), (ROWS, torch.float16), (ROWS + 3, torch.float32)], ids=str
)
def test_forks_are_compared_with_what_they_share_and_with_their_own(
    candidates: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Two searches, one with windows of several sizes, beside sequences that share nothing, or the first blocks only."""
    held = Held(16, 48, dtype, device)
    tables, position, window = [], [], []
    for length, windows in ((67, [0]), (32, [0, 40, 9, 17, 1])):
        trunk = held.table(6)
        held.fill(trunk, 0, length)
        for i in range(candidates):
            tables.append(held.table(6, trunk, length // 16))
            held.fill(tables[-1], length // 16 * 16, length + 1 + i % 2)
            position.append(length + 1 + i % 2), window.append(windows[i % len(windows)])
        tables.append(held.table(6, trunk, 1))
        held.fill(tables[-1], 16, 70)
        position.append(70), window.append(0)
        tables.append(held.table(6))
        held.fill(tables[-1], 0, 20)
        position.append(20), window.append(0)
    check(held, held.random(len(tables)), torch.stack(tables), position, window)


def test_entries_of_one_sequence_see_what_is_earlier_than_each(device: torch.device) -> None:
    """Every query is the very state at its position, which itself and those after it don't show."""
    held = Held(16, 48, torch.float32, device)
    table, position = held.table(3), list(range(25, 41))
    held.fill(table, 0, 41)
    queries = torch.stack([held.pages[table[p // 16], p % 16] for p in position])
    found = check(held, queries, table.expand(16, -1), position, [0, 5] * 8)
    assert found.max() < 0.9


def test_what_neighbours_share_is_read_once() -> None:
    """Tiles of two searches of 5 and 18 candidates and of one sequence more, and their entries."""
    shared, own = torch.arange(1, 41), torch.arange(100, 124)
    tables = torch.cat([torch.cat((shared[:39].expand(23, -1) + 500 * (torch.arange(23) >= 5)[:, None], own[:23, None]), 1),
                        torch.arange(2000, 2040)[None]])  # fmt: skip
    end = torch.full((24,), 40 * 16 - 3)
    found = plan(tables.numpy(), torch.zeros_like(end).numpy(), end.numpy(), 16, torch.device("cpu")).tiles
    entry, rows = found[:, 0].tolist(), found[:, 1].tolist()
    assert sum(count == 5 for count in rows) == 39
    assert sum(count == 16 for count in rows) == sum(count == 2 for count in rows) == 39
    assert sorted(e for e, count in zip(entry, rows, strict=True) if count == 1) == [*range(23), *[23] * 40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_entry_notices_another(dtype: torch.dtype, device: torch.device) -> None:
    """Bit by bit: alone, in another order, as part of a run or on its own."""
    held = Held(16, 144, dtype, device)
    trunk, other = held.table(7), held.table(7)
    held.fill(trunk, 0, 107), held.fill(other, 0, 50)
    tables = torch.stack([trunk] * 18 + [other] * 3)
    queries, position = held.random(21), torch.tensor([107] * 10 + [100] * 8 + [50] * 3)
    window = torch.zeros_like(position)
    together = similarity(queries, held.pages, tables, position, window)
    mixed = torch.tensor([20, 3, 19, 0, 17, 16, 15, 18, 11, 1])
    for index in (mixed, *torch.tensor([[0], [12], [20]])):
        found = similarity(queries[index], held.pages, tables[index], position[index], window[index])
        assert torch.equal(found, together[index])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_states_that_are_wider_than_pages_are_not_rounded(dtype: torch.dtype, device: torch.device) -> None:
    held = Held(16, 80, dtype, device)
    table = held.table(3)
    held.fill(table, 0, 40)
    check(held, held.random(1).float() * 1.001, table[None], [40], [0])


def test_a_state_resembles_itself_by_one_and_a_state_of_zeros_nothing(device: torch.device) -> None:
    held = Held(16, 48, torch.float32, device)
    table, same = held.table(1), held.random(16)
    write_states(same, held.pages, table.expand(16).to(device), torch.arange(16, device=device))
    ones, all_of_it = torch.full((16,), 16), torch.zeros(16, dtype=torch.long)
    found = similarity(same * 7, held.pages, table.expand(16, 1), ones, all_of_it)
    assert found.max() <= 1 and found.min() > 1 - 1e-6
    zeros = torch.zeros(1, 48, device=device)
    write_states(zeros, held.pages, table.to(device), torch.zeros(1, dtype=torch.long, device=device))
    assert held.pages[table[0], 0].count_nonzero() == 0
    assert similarity(zeros, held.pages, table[None], ones[:1], all_of_it[:1]).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("width", [3, 48, 1100])
def test_states_are_stored_with_norm_one_and_nothing_else_changes(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """To the last bit that is stored; the interpreter cuts numbers to bf16 where a GPU rounds them."""
    held = Held(8, width, dtype, device, blocks=6)
    blocks, offsets = torch.tensor([5, 1, 5, 2], device=device), torch.tensor([0, 7, 3, 4], device=device)
    states, before = held.random(4), held.pages.clone()
    write_states(states, held.pages, blocks, offsets)
    exact = states.double() / states.double().norm(dim=-1, keepdim=True)
    tolerance = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}[dtype]
    torch.testing.assert_close(held.pages[blocks, offsets].double(), exact, atol=1e-7, rtol=tolerance)
    before[blocks, offsets] = held.pages[blocks, offsets]
    torch.testing.assert_close(held.pages, before, atol=0, rtol=0, equal_nan=True)


def test_pages_that_do_not_lie_together_are_refused(device: torch.device) -> None:
    pages, one = torch.zeros(4, 16, 8, device=device).transpose(1, 2), torch.tensor([1])
    with pytest.raises(ValueError, match="pages must lie together"):
        similarity(torch.zeros(1, 16, device=device), pages, one[None], one, one)
    with pytest.raises(ValueError, match="pages must lie together"):
        write_states(torch.zeros(1, 16, device=device), pages, one.to(device), one.to(device))

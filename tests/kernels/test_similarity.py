"""Similarity to earlier states, read off pages, equals the largest cosine in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pagefork.kernels import similarity as kernel
from pagefork.kernels.similarity import similarity, unit, write_states


class Pages:
    """Sequences on pages that are full of NaN but for what was written; `states` are what they hold, in float64."""

    def __init__(self, size: int, width: int, lengths: list[int], dtype: torch.dtype = torch.float32, blocks: int = 200) -> None:
        rng = np.random.default_rng(size * width)
        self.size = size
        self.pages = torch.full((blocks, size, width), torch.nan, dtype=dtype)
        columns = -(-max(lengths) // size) + 1
        self.tables = torch.from_numpy(rng.permutation(blocks - 1)[: len(lengths) * columns].reshape(-1, columns) + 1)
        self.states = [torch.from_numpy(rng.normal(size=(length, width)) * 5).to(dtype) for length in lengths]
        for table, states in zip(self.tables, self.states, strict=True):
            self.write(states, table, 0)

    def write(self, states: Tensor, table: Tensor, start: int) -> None:
        place = torch.arange(start, start + len(states))
        write_states(states, self.pages, table[place // self.size], place % self.size)


def expected(query: Tensor, states: Tensor, position: int, window: int) -> float:
    earlier = states.double().numpy()[max(0, position - window) if window else 0 : position]
    if not len(earlier):
        return -1.0
    h = query.double().numpy()
    return float((earlier @ h / np.linalg.norm(earlier, axis=-1) / np.linalg.norm(h)).max())


@pytest.mark.parametrize(("size", "width"), [(1, 3), (4, 33), (16, 64), (7, 129)])
@pytest.mark.parametrize("window", [0, 1, 6, 40])
def test_it_is_the_largest_cosine_to_an_earlier_position(
    size: int, width: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_STATES", 5 * size * width)  # a few products per run
    lengths = [0, 1, 2, size, size + 1, 3 * size, 3 * size + 1, 31, 32, 33]
    held = Pages(size, width, lengths, blocks=500)
    position = torch.tensor(lengths)
    queries = torch.randn(len(lengths), width, generator=torch.Generator().manual_seed(0)) * 3
    found = similarity(queries, held.pages, held.tables, position, torch.full_like(position, window))
    for i, length in enumerate(lengths):
        assert abs(found[i] - expected(queries[i], held.states[i], length, window)) < 1e-6
    assert found[0] == -1


@pytest.mark.parametrize("candidates", [1, 5, 8, 19])
def test_forks_that_share_blocks_are_each_compared_with_their_own_tokens(candidates: int) -> None:
    """Two searches, one with windows of several sizes, between sequences that share nothing."""
    held = Pages(4, 20, [30, 50, 26])
    tables, queries, position, window, values = [], [], [], [], []
    generator = torch.Generator().manual_seed(candidates)
    spare = iter(sorted(set(range(1, 200)) - set(held.tables.flatten().tolist())))
    for search in range(2):
        states = held.states[search]
        length = len(states)
        for i in range(candidates):
            table = held.tables[search].clone()
            column = length // 4
            table[column] = next(spare)
            held.pages[table[column]] = held.pages[held.tables[search, column]]
            own = torch.randn(1, 20, generator=generator)
            held.write(own, table, length)
            tables.append(table)
            queries.append(own[0] + 0.1)
            position.append(length + 1)
            window.append(i % 7 if search else 0)
            values.append(expected(queries[-1], torch.cat((states, own)), length + 1, window[-1]))
        tables.append(held.tables[2]), queries.append(own[0]), position.append(26), window.append(0)
        values.append(expected(own[0], held.states[2], 26, 0))
    args = (torch.stack(queries), held.pages, torch.stack(tables), torch.tensor(position), torch.tensor(window))
    found = similarity(*args)
    np.testing.assert_allclose(found.numpy(), values, atol=1e-6)


@pytest.mark.parametrize("states_at_once", [1, 5 * 4 * 2, 1 << 19])
def test_a_window_ends_where_it_says(states_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier a state, the more it resembles the query; so the first one of the window counts."""
    monkeypatch.setattr(kernel, "_STATES", states_at_once)
    held = Pages(4, 2, [61])
    angle = torch.linspace(0.1, 3, 61, dtype=torch.float64)
    held.write(torch.stack((angle.cos(), angle.sin()), -1), held.tables[0], 0)
    window = torch.arange(62)
    tables, position = held.tables.expand(62, -1), torch.full((62,), 61)
    found = similarity(torch.tensor([[1.0, 0.0]]).expand(62, -1), held.pages, tables, position, window)
    first = (61 - window).clamp(min=0)
    first[0] = 0
    np.testing.assert_allclose(found.numpy(), angle[first].cos().numpy(), atol=1e-6)


def test_no_entry_notices_another() -> None:
    held = Pages(16, 64, [100, 37])
    queries = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    tables = held.tables[torch.tensor([0] * 10 + [1, 1])]
    position = torch.tensor([100] * 10 + [37, 37])
    window = torch.zeros_like(position)
    together = similarity(queries, held.pages, tables, position, window)
    for i in range(12):
        one = slice(i, i + 1)
        assert similarity(queries[one], held.pages, tables[one], position[one], window[one])[0] == together[i]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pages_of_half_precision_are_added_up_in_fp32(dtype: torch.dtype) -> None:
    held = Pages(16, 512, [90], dtype)
    table, place = held.tables[0], torch.arange(90)
    stored = held.pages[table[place // 16], place % 16].double()
    torch.testing.assert_close(stored, torch.nn.functional.normalize(held.states[0].double(), dim=-1), atol=2e-3, rtol=0)
    query = stored[3:4] + torch.randn(1, 512, generator=torch.Generator().manual_seed(2)) * 0.01
    found = similarity(query.float(), held.pages, table[None], torch.tensor([90]), torch.tensor([0]))
    exact = (stored @ torch.nn.functional.normalize(query, dim=-1)[0]).max()
    assert abs(float(found[0]) - float(exact)) < 1e-6


def test_a_state_of_zeros_resembles_nothing() -> None:
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))
    pages = torch.zeros(3, 4, 5)
    one = torch.tensor([2])
    assert similarity(torch.ones(1, 5), pages, torch.tensor([[1]]), one, one).tolist() == [0.0]
    empty = torch.empty(0, dtype=torch.long)
    assert similarity(torch.ones(0, 5), pages, torch.empty(0, 1, dtype=torch.long), empty, empty).shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    pages, table, zero = torch.zeros(3, 4, 5), torch.tensor([[1, 2]]), torch.tensor([0])
    with pytest.raises(ValueError, match="go together"):
        similarity(torch.zeros(1, 6), pages, table, zero, zero)
    with pytest.raises(ValueError, match="go together"):
        similarity(torch.zeros(1, 5), pages, table, torch.tensor([0, 0]), zero)
    for position, window in ((-1, 0), (9, 0), (3, -1)):
        with pytest.raises(ValueError, match=r"positions must be in \[0, 8\] and windows >= 0"):
            similarity(torch.zeros(1, 5), pages, table, torch.tensor([position]), torch.tensor([window]))
    with pytest.raises(ValueError, match="2 places for states of 5; given states"):
        write_states(torch.zeros(1, 5), pages, torch.tensor([1, 2]), torch.tensor([0, 0]))

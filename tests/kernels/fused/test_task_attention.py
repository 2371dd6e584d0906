"""Attention by tasks is attention: near float64 whatever the shapes, the lengths and what else is in the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attention import Pages

SPLIT = 32
NEAR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def check(pages: Pages, rows: list[tuple[int, int, int]], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Every row within the bound of its dtype, relative to the largest results."""
    dense = {name: options[name] for name in ("window", "softcap", "sinks") if name in options}
    for found, row in zip(pages.attend(rows, split=SPLIT, **options), rows, strict=True):
        right = pages.dense(*row, **dense)
        assert (found.double() - right).abs().max() <= NEAR[dtype] * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("invariant", [False, True])
def test_lengths_around_blocks_and_splits_in_one_step(invariant: bool, dtype: torch.dtype, device: torch.device) -> None:
    pages = Pages(4, 1, 16, [SPLIT - 1, SPLIT, SPLIT + 1, 15, 17, 70], block_size=16, dtype=dtype, device=device)
    rows = [(0, 30, 1), (1, 31, 1), (2, 32, 1), (3, 0, 15), (4, 15, 2), (5, 20, 50)]
    check(pages, rows, dtype, invariant=invariant, padding=2)


@pytest.mark.parametrize(("heads", "kv_heads", "size", "value_size"), [(2, 2, 64, 64), (8, 1, 80, 128), (3, 1, 128, 40)])
def test_head_sizes_and_groups(heads: int, kv_heads: int, size: int, value_size: int, device: torch.device) -> None:
    pages = Pages(heads, kv_heads, size, [40, 9], value_size, block_size=16, device=device)
    check(pages, [(0, 39, 1), (1, 2, 7)])


@pytest.mark.parametrize("block_size", [1, 7, 12])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    check(Pages(2, 1, 16, [45, 8], block_size=block_size, device=device), [(0, 44, 1), (1, 0, 8)])


@pytest.mark.parametrize("window", [1, 20, 33])
def test_windows(window: int, device: torch.device) -> None:
    pages = Pages(2, 1, 16, [70, 66], shared=4, device=device)
    check(pages, [(0, 65, 1), (1, 65, 1)], trunk=[(0, 2, 4)], window=window)
    check(pages, [(0, 60, 10)], window=window)


def test_soft_caps_and_sinks(device: torch.device) -> None:
    pages = Pages(4, 2, 16, [70, 33], device=device)
    rows = [(0, 69, 1), (1, 30, 3)]
    check(pages, rows, softcap=1.5)
    check(pages, rows, softcap=0.01)  # which no exponential may overflow
    check(pages, rows, sinks=torch.tensor([-1.0, 3.0, 0.0, 50.0], device=device))


@pytest.mark.parametrize("invariant", [False, True])
def test_soft_caps_with_a_window(invariant: bool, device: torch.device) -> None:
    pages = Pages(2, 1, 16, [75, 40], device=device)
    check(pages, [(0, 66, 9), (1, 39, 1)], softcap=0.7, window=37, invariant=invariant)


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_any_number_of_programs_does_all_tasks(programs: int, device: torch.device) -> None:
    check(Pages(2, 1, 16, [70, 33], device=device), [(0, 69, 1), (1, 32, 1)], programs=programs, padding=1)


def test_whole_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagefork.kernels.attention_tasks._WHOLE_HEIGHT", 40)
    pages = Pages(2, 1, 16, [75, 40], device=device)
    for window in (None, 20):
        for invariant in (False, True):
            check(pages, [(0, 5, 70), (1, 39, 1)], window=window, invariant=invariant, sinks=torch.ones(2, device=device))


@pytest.mark.parametrize("window", [None, 40])
def test_invariant_results_are_the_same_bits_however_they_are_computed(
    window: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(2, 1, 16, [73, 73, 73], shared=4, device=device)

    def found(*rows: tuple[int, int, int], trunk: tuple[tuple[int, int, int], ...] = ()) -> list[torch.Tensor]:
        return pages.attend(rows, trunk=trunk, window=window, invariant=True)

    [whole] = found((0, 64, 9))
    chunks = [found((0, 64, 5))[0], *found((0, 69, 3), (1, 64, 9))[:1], *found((1, 70, 1), (0, 72, 1))[1:]]
    assert torch.equal(torch.cat(chunks), whole)
    others = [whole, found((1, 64, 9))[0], found((2, 64, 9))[0]]
    shared = found((0, 64, 9), (1, 64, 9), (2, 64, 9), trunk=((0, 3, 4),))
    assert all(torch.equal(a, b) for a, b in zip(shared, others, strict=True))
    monkeypatch.setattr("pagefork.kernels.attention_tasks._WHOLE_HEIGHT", 9)  # 9 tokens and more are done in registers
    assert torch.equal(found((0, 64, 9))[0], whole)
    assert torch.equal(found((0, 0, 73))[0][64:], whole)


def test_a_shared_trunk_changes_rounding_at_most(device: torch.device) -> None:
    pages = Pages(4, 1, 16, [70, 71, 72], shared=4, device=device)
    check(pages, [(0, 69, 1), (1, 70, 1), (2, 68, 4)], trunk=[(0, 3, 4)])


def test_a_whole_prompt_beside_a_shared_trunk(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagefork.kernels.attention_tasks._WHOLE_HEIGHT", 40)
    pages = Pages(2, 1, 16, [70, 71, 72, 68, 45], shared=4, device=device)
    rows = [(4, 0, 45), (0, 69, 1), (1, 70, 1), (2, 68, 4), (3, 4, 40)]
    check(pages, rows, trunk=[(1, 3, 4)], padding=1)
    check(pages, rows, trunk=[(0, 5, 4)], window=40)


def test_steps_of_whole_prompts_and_few_keys_have_nothing_to_merge(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagefork.kernels.attention_tasks._WHOLE_HEIGHT", 40)
    monkeypatch.setattr("pagefork.kernels.task_attention.merge_parts", None)
    check(Pages(2, 1, 16, [70, 20], device=device), [(0, 0, 70), (1, 19, 1)], padding=2)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    pages = Pages(2, 1, 16, [9], device=device)
    pages.k = pages.k.half()
    with pytest.raises(ValueError, match="float16"):
        pages.attend([(0, 8, 1)])

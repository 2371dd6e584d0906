"""A preempted group computes again what runs, each shared block once, and nothing that is parked."""

from __future__ import annotations

import pytest
from support.harness import Harness
from support.requests import prompt
from support.toys import BeamToyParams, LookToyParams

from pagefork.scheduler.group import Group
from pagefork.scheduler.params import SamplingParams


def preempt(harness: Harness, name: str) -> tuple[Group, list[list[int]], int]:
    """Preempt a request; its group, the tokens of its sequences that run, and how many are parked."""
    scheduler = harness.scheduler
    group, table = scheduler._by_id[name], scheduler.kv.table
    seqs = table.of(group.number)
    scheduler.residents._preempt(group)
    scheduler.check()
    running = seqs[table.run[seqs]].tolist()
    return group, [group.history(seq).tolist() for seq in running], len(seqs) - len(running)


def recomputed(harness: Harness, group: Group) -> int:
    """Tokens that are computed until the strategy goes on: all that was lost, and a row of each sequence."""
    before, tokens = group.usage.forward_tokens, len(group.tokens._token)
    while len(group.tokens._token) == tokens:
        harness.step()
    return group.usage.forward_tokens - before


def least(running: list[list[int]], size: int) -> int:
    """Tokens to compute if each full block before a last token, that several sequences share, is computed once."""
    blocks: set[tuple[int, ...]] = set()
    total = 0
    for path in running:
        ends = range(size, len(path), size)
        total += len(path) - max((end for end in ends if tuple(path[:end]) in blocks), default=0)
        blocks |= {tuple(path[:end]) for end in ends}
    return total


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("budget", [20, 200])
def test_each_block_that_beams_share_is_computed_once_again(size: int, budget: int) -> None:
    harness = Harness(1000, size, 12, budget, enable_prefix_caching=False)
    name = harness.add(prompt(10), BeamToyParams(width=8, max_tokens=40))
    for steps in (12, 13, 9):
        for _ in range(steps):
            harness.step()
        group, running, parked = preempt(harness, name)
        assert parked == 0 and len(running) == 8
        assert recomputed(harness, group) == least(running, size)
        assert least(running, size) < sum(map(len, running)) / 2
    harness.run()
    harness.assert_expected()


def test_what_is_parked_is_not_computed_again() -> None:
    harness = Harness(1000, 4, 12, 200, enable_prefix_caching=False)
    name = harness.add(prompt(13), LookToyParams(branch=3, max_tokens=12))
    for _ in range(5):
        harness.step()
    group, running, parked = preempt(harness, name)
    assert parked == 1 and len(running) == 3
    # The parked one is all that the others know but for one token, so that their shared blocks are its blocks.
    assert recomputed(harness, group) == least(running, 4)
    harness.run()
    harness.assert_expected()


def test_a_group_comes_back_only_when_all_that_it_held_has_room() -> None:
    """Else it would drive others out, or be driven out, again and again."""
    harness = Harness(60, 4, 12, 64, enable_prefix_caching=False)
    first = harness.add(prompt(20), SamplingParams(temperature=0, max_tokens=60))
    wide = harness.add(prompt(9, 1), SamplingParams(n=6, max_tokens=24))
    for _ in range(20):
        harness.step()
    preempt(harness, wide)
    held = harness.scheduler._by_id[wide].needed
    assert held > 6 * 4
    blocker = harness.scheduler.kv.pool.allocate(harness.scheduler.kv.pool.free - held)
    harness.scheduler.check = lambda: None  # type: ignore[method-assign]
    for _ in range(8):
        harness.step()
    assert harness.scheduler.num_running == 1
    harness.scheduler.kv.pool.release(blocker)
    harness.run()
    harness.assert_expected()
    assert harness.requests[wide].preemptions == 1 and harness.requests[first].preemptions == 0

"""What a request cost is counted, and how its outputs came about is told with its end."""

from __future__ import annotations

from typing import Any

import pytest
from support.harness import Harness
from support.requests import GREEDY, prompt
from support.toys import BeamToy, BeamToyParams

from pagefork.scheduler.accounting import Trace, Usage
from pagefork.scheduler.errors import BudgetExceededError
from pagefork.scheduler.group import Group
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.plan import Plan
from pagefork.scheduler.strategies.base import Edit, Ids


def plans(harness: Harness) -> list[Plan]:
    seen: list[Plan] = []
    submit = harness.runner.submit
    harness.runner.submit = lambda plan: (seen.append(plan), submit(plan))[1]  # type: ignore[method-assign, func-returns-value]
    return seen


def usage(harness: Harness, name: str) -> Usage:
    found = harness.requests[name].usage
    assert found is not None
    return found


def test_usages_add_up_to_what_the_plans_said() -> None:
    harness = Harness(60, 4, 12, 24)
    seen = plans(harness)
    for seed in range(4):
        harness.add(prompt(10 + seed, seed), BeamToyParams(width=1 + seed, max_tokens=9))
        harness.add(prompt(10 + seed, seed), SamplingParams(n=4, max_tokens=9 + seed))
    for _ in range(12):
        harness.step()
    residents = harness.scheduler.residents
    residents._preempt(max(residents.running.values(), key=lambda group: group.order))
    harness.run()
    found = [usage(harness, name) for name in harness.requests]
    assert sum(item.forward_tokens for item in found) == sum(len(plan.rows.tokens) for plan in seen)
    assert sum(item.blocks_copied for item in found) == sum(len(plan.copies.dst) for plan in seen)
    assert sum(item.forks for item in found) == harness.scheduler.kv.forks
    assert all(type(value) is int for item in found for value in (item.forward_tokens, item.forks, item.blocks_copied))


def test_n_sequences_of_a_prompt_are_n_minus_1_forks_that_copy_its_last_block() -> None:
    harness = Harness(100, 4, 12, 64)
    name = harness.add(prompt(42), SamplingParams(n=5, max_tokens=3))
    harness.run()
    # 42 tokens: 10 full blocks, held by 5, and 5 of the next, of which one is the prompt's own.
    assert usage(harness, name) == Usage(
        42 + 5 * 2, forks=4, blocks_copied=4, blocks_freed=0, shared_block_ratio=pytest.approx(44 / 55)
    )


def test_what_is_shared_is_measured_where_it_would_be_the_most() -> None:
    """At 20 + 5 tokens each of the four holds the 5 blocks of the prompt and 2 of its own: 28 entries, 13 blocks."""
    harness = Harness(100, 4, 12, 64)
    name = harness.add(prompt(20), SamplingParams(n=4, max_tokens=6))
    ratios = []
    while harness.scheduler.has_unfinished:
        harness.step()
        ratios.append(harness.scheduler.shared_block_ratio)
    assert usage(harness, name).shared_block_ratio == pytest.approx(1 - 13 / 28)
    assert ratios[0] == pytest.approx(1 - 5 / 20), "the fork shares the prompt's blocks at once"
    assert ratios[-1] == 0.0


def test_a_single_sequence_shares_nothing_and_frees_nothing_before_its_end() -> None:
    harness = Harness(100, 4, 12, 64)
    name = harness.add(prompt(9), GREEDY)
    harness.run()
    assert usage(harness, name) == Usage(9 + len(harness.requests[name].tokens[0]) - 1)


def test_blocks_of_dropped_beams_count_as_freed() -> None:
    harness = Harness(200, 4, 12, 64)
    name = harness.add(prompt(9), BeamToyParams(width=6, max_tokens=16))
    free: list[int] = []
    apply = harness.scheduler.apply

    def watched(result: Any) -> Any:
        before = harness.scheduler.kv.pool.free
        updates = apply(result)
        if harness.scheduler.has_unfinished:
            free.append(harness.scheduler.kv.pool.free - before)
        return updates

    harness.scheduler.apply = watched  # type: ignore[method-assign]
    harness.run()
    assert usage(harness, name).blocks_freed == sum(free) > 0


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> type[BeamToyParams]:
    """The beam toy with a trace of its width, once for each step."""
    advance = BeamToy.advance

    def recording(self: BeamToy, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        edits = advance(self, group, seqs, reads)
        self.recorded = [*getattr(self, "recorded", []), self.width]  # type: ignore[attr-defined]
        return edits

    monkeypatch.setattr(BeamToy, "advance", recording)
    monkeypatch.setattr(BeamToy, "trace", lambda self: getattr(self, "recorded", []))
    return BeamToyParams


def test_a_trace_comes_with_the_last_update_whatever_the_end(traced: type[BeamToyParams]) -> None:
    harness = Harness(100, 4, 12, 64)
    whole = harness.add(prompt(9), traced(width=2, max_tokens=5, trace=True))
    harness.run()
    aborted = harness.add(prompt(9), traced(width=2, max_tokens=9, trace=True))
    unasked = harness.add(prompt(9), traced(width=2, max_tokens=5))
    for _ in range(3):
        harness.step()
    harness.abort(aborted)
    failed = harness.add(prompt(9, 1), traced(width=2, max_tokens=9, trace=True))
    harness.step()
    harness.runner.poison = set(range(1000))
    harness.run()
    trace = harness.requests[whole].trace
    assert trace == Trace("beamtoy", [2] * 5, usage(harness, whole))
    assert len(harness.requests[aborted].trace.steps) == 3  # type: ignore[union-attr]
    assert harness.requests[failed].trace is not None and harness.requests[failed].error is not None
    assert harness.requests[unasked].trace is None


@pytest.mark.parametrize("params", [SamplingParams(n=3, max_tokens=40), BeamToyParams(width=3, max_tokens=40)])
def test_a_request_over_its_budget_of_computed_tokens_fails_alone_and_within_a_step(params: CommonParams) -> None:
    harness = Harness(200, 4, 12, 64)
    name = harness.add(prompt(20), params, max_forward_tokens=50)
    other = harness.add(prompt(20), GREEDY)
    harness.run()
    error = harness.requests[name].error
    assert isinstance(error, BudgetExceededError) and "it may compute 50 (max_forward_tokens)" in str(error)
    assert 50 < usage(harness, name).forward_tokens <= 50 + 3
    assert harness.requests[other].error is None
    harness.assert_expected(BudgetExceededError)


def test_a_request_within_its_budget_is_left_alone() -> None:
    harness = Harness(200, 4, 12, 64)
    name = harness.add(prompt(20), SamplingParams(n=3, max_tokens=11), max_forward_tokens=20 + 3 * 10)
    harness.run()
    assert harness.requests[name].error is None and usage(harness, name).forward_tokens == 50

"""Generations of several sequences: read in parts, forked while they are read, waiting for values from outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.harness import Harness
from support.oracle import scores
from support.requests import GREEDY, prompt
from support.toys import BeamToyParams, ForkToyParams, LookToy, LookToyParams

from pagefork.scheduler.errors import NumericError, StepFailedError, ValueFunctionError
from pagefork.scheduler.group import Group
from pagefork.scheduler.plan import Result, Spec
from pagefork.scheduler.strategies.base import Ask, Edit, Ids


def preempt(harness: Harness, name: str) -> None:
    scheduler = harness.scheduler
    scheduler.residents._preempt(scheduler._by_id[name])
    scheduler.check()


@pytest.mark.parametrize("budget", [8, 9, 12, 40])
def test_a_merge_whose_rows_take_several_steps_finds_the_best_of_all(budget: int) -> None:
    """After a preemption the beams are longer than what a step computes, so that their reads come in parts."""
    harness = Harness(200, 4, 6, budget)
    name = harness.add(prompt(9), BeamToyParams(width=5, max_tokens=14))
    parts: list[int] = []
    advance = harness.scheduler.apply

    def apply(result: Result) -> Any:
        group = harness.scheduler._by_id.get(name)
        parts.append(len(group.held) if group else 0)
        return advance(result)

    harness.scheduler.apply = apply  # type: ignore[method-assign]
    for steps in (9, 3, 2):
        for _ in range(steps):
            harness.step()
        if not harness.requests[name].done:
            preempt(harness, name)
    harness.run()
    harness.assert_expected()
    assert budget > 12 or max(parts) > 0, "no generation was read in parts"


@pytest.mark.parametrize("branch", [1, 3])
@pytest.mark.parametrize("lag", [0, 1])
def test_children_forked_in_the_read_of_a_generation_draw_grow_and_park(branch: int, lag: int) -> None:
    harness = Harness(100, 4, 12, 40, lag=lag)
    for seed in range(3):
        tokens = prompt(6 + seed, seed)
        harness.add(tokens, ForkToyParams(branch=branch, max_tokens=11))
    harness.add(prompt(7), GREEDY)
    for step in range(14):
        harness.step()
        if step in (5, 9) and not harness.requests["2"].done:
            preempt(harness, "2")
    harness.run()
    harness.assert_expected()
    assert harness.requests["0"].usage.forks == 11 * branch  # type: ignore[union-attr]
    assert harness.requests["2"].preemptions > 0


def test_what_was_read_in_a_second_read_and_not_grown_gives_its_slot_back() -> None:
    harness = Harness(100, 4, 12, 40)
    harness.add(prompt(6), ForkToyParams(branch=4, max_tokens=2))
    for _ in range(2):
        harness.step()
        assert harness.scheduler.residents.slots.free in (11, 12)
    harness.run()


def test_an_ask_is_answered_while_its_group_has_lost_its_blocks() -> None:
    harness = Harness(100, 4, 6, 24)
    harness.answer_at_once = False
    name = harness.add(prompt(9), LookToyParams(branch=3, max_tokens=6))
    answered = 0
    while not harness.requests[name].done:
        harness.step()
        if harness.asks:
            preempt(harness, name)
            harness.step()
            harness.answer()
            answered += 1
    harness.run()
    harness.assert_expected()
    assert answered == 5 and harness.requests[name].preemptions == 5


def test_values_for_a_request_that_has_ended_change_nothing() -> None:
    harness = Harness(100, 4, 6, 24)
    harness.answer_at_once = False
    name = harness.add(prompt(9), LookToyParams(branch=3, max_tokens=6))
    while not harness.asks:
        harness.step()
    harness.abort(name)
    assert harness.scheduler.answer(name, [0.0, 0.0, 0.0]) is None
    assert harness.scheduler.fail(name, ValueFunctionError("late")) is None
    harness.asks.clear()
    harness.run()
    harness.assert_expected()
    assert harness.requests[name].reasons == {0: "abort"}


def test_a_request_whose_values_failed_ends_with_that_error_and_the_others_go_on() -> None:
    harness = Harness(100, 4, 6, 24)
    harness.answer_at_once = False
    name = harness.add(prompt(9), LookToyParams(branch=3, max_tokens=6))
    other = harness.add(prompt(9, 1), GREEDY)
    while not harness.asks:
        harness.step()
    update = harness.scheduler.fail(name, ValueFunctionError("no values"))
    assert update is not None
    harness.take([update])
    harness.asks.clear()
    harness.run()
    harness.assert_expected(ValueFunctionError)
    assert harness.requests[name].reasons == {0: "error"} and harness.requests[other].error is None


def test_a_strategy_that_raises_on_values_ends_its_own_request() -> None:
    harness = Harness(100, 4, 6, 24)
    harness.answer_at_once = False
    name = harness.add(prompt(9), LookToyParams(branch=3, max_tokens=6))
    harness.add(prompt(9, 1), GREEDY)
    while not harness.asks:
        harness.step()
    harness.asks.clear()
    update = harness.scheduler.answer(name, [0.0] * 7 + [object()])  # type: ignore[list-item]
    assert update is not None and isinstance(update.error, StepFailedError) and update.done
    harness.take([update])
    harness.run()
    harness.assert_expected(StepFailedError)


def test_two_asks_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(100, 4, 6, 24)
    advance = LookToy.advance

    def twice(self: LookToy, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        edits = advance(self, group, seqs, reads)
        return edits * 2 if isinstance(edits[0], Ask) else edits

    monkeypatch.setattr(LookToy, "advance", twice)
    name = harness.add(prompt(9), LookToyParams(branch=3, max_tokens=6))
    harness.run()
    assert "one at a time" in str(harness.requests[name].error)


def test_nan_in_one_row_of_a_wide_group_ends_that_group_alone() -> None:
    harness = Harness(400, 4, 12, 40)
    wide = harness.add(prompt(9), BeamToyParams(width=6, max_tokens=12))
    like = harness.add(prompt(9, 1), BeamToyParams(width=5, max_tokens=12))
    collect = harness.runner.collect

    def poisoned() -> Result:
        result = collect()
        if result.step == 5:
            (merged,) = [reads for reads in result.reads if reads.parent is not None and len(reads.bad) == 6]
            merged.bad[4] = True
        return result

    harness.runner.collect = poisoned  # type: ignore[method-assign]
    harness.run()
    assert isinstance(harness.requests[wide].error, NumericError)
    assert harness.requests[like].error is None
    harness.assert_expected(NumericError)


def test_merged_scores_are_those_of_the_models_log_probs() -> None:
    """The reference of the toy sums in the same order; this one sums afresh in float64."""
    harness = Harness(100, 4, 12, 40)
    tokens = prompt(9)
    name = harness.add(tokens, BeamToyParams(width=4, max_tokens=8))
    harness.run()
    tracked = harness.requests[name]
    for index, output in enumerate(tracked.tokens):
        total = sum(scores([*tokens, *output[:i]], Spec(prompt_len=9))[token] for i, token in enumerate(output))
        assert np.isclose(tracked.scores[index], total, atol=1e-5)  # type: ignore[arg-type]

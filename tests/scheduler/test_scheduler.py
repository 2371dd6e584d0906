"""Order, pressure, abort and preemption at any time, and plans as plain data."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from support.harness import Harness
from support.requests import GREEDY, GROUPS, prompt
from support.toys import BeamToyParams

from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.plan import Plan


def test_decode_rows_are_not_delayed_by_a_long_prompt() -> None:
    harness = Harness(200, 4, 12, 24)
    first = harness.add(prompt(5), SamplingParams(temperature=0, max_tokens=10))
    harness.step()
    harness.add(prompt(100, 1), GREEDY)
    for count in range(2, 6):
        harness.step()
        assert len(harness.requests[first].tokens[0]) == count
    harness.run()
    harness.assert_expected()


def test_first_come_is_first_served_and_a_lower_priority_value_goes_first() -> None:
    for policy, order in (("fcfs", ["0", "1", "2"]), ("priority", ["0", "2", "1"])):
        harness = Harness(200, 4, 1, 24, policy=policy)
        for priority in (0, 5, 1):
            harness.add(prompt(5, priority), GREEDY, priority=priority)
            harness.step()
        finished: list[str] = []
        while harness.scheduler.has_unfinished:
            harness.step()
            finished += [name for name, tracked in harness.requests.items() if tracked.done and name not in finished]
        assert finished == order


def test_pressure_preempts_the_youngest_and_never_an_older_one() -> None:
    harness = Harness(16, 4, 12, 64)
    for seed in range(3):
        harness.add(prompt(10, seed), SamplingParams(temperature=0, max_tokens=25))
    updates: dict[str, int] = {}
    take = harness.take
    harness.take = lambda got: (updates.update({u.request_id: u.preemptions for u in got if u.done}), take(got))[1]  # type: ignore[method-assign, func-returns-value]
    harness.run()
    harness.assert_expected()
    assert updates["0"] == 0 and updates["2"] > 0


def test_a_wide_group_is_bypassed_only_so_often() -> None:
    harness = Harness(400, 4, 12, 200)
    for seed in range(6):
        harness.add(prompt(5, seed), SamplingParams(temperature=0, max_tokens=30))
    harness.step()
    wide = harness.add(prompt(5, 99), SamplingParams(n=12, max_tokens=2))
    for seed in range(100, 200):
        harness.add(prompt(5, seed), SamplingParams(temperature=0, max_tokens=4))
    finished = 0
    while not harness.requests[wide].done:
        harness.step()
        finished = sum(tracked.done for tracked in harness.requests.values())
    assert 7 <= finished <= 40
    harness.run()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("params", [GREEDY, *GROUPS])
def test_abort_after_any_number_of_steps_releases_everything_and_touches_nobody_else(params: CommonParams, lag: int) -> None:
    for steps in range(16):
        harness = Harness(60, 4, 12, 16, lag=lag)
        harness.add(prompt(20, 1), GREEDY)
        name = harness.add(prompt(20), params)
        for _ in range(steps):
            harness.step()
        harness.abort(name)
        harness.scheduler.check()
        assert harness.requests[name].done
        harness.abort(name)
        harness.run()
        harness.assert_expected()


@pytest.mark.parametrize("params", GROUPS)
def test_a_group_preempted_after_any_number_of_steps_gives_the_same_tokens(params: CommonParams) -> None:
    for lag in (0, 1):
        for steps in range(16):
            harness = Harness(80, 4, 12, 16, lag=lag)
            harness.add(prompt(20, 1), GREEDY)
            name = harness.add(prompt(21), params)
            for _ in range(steps):
                harness.step()
            group = harness.scheduler._by_id.get(name)
            if group is not None and group.number in harness.scheduler.residents.running:
                harness.scheduler.residents._preempt(group)
                harness.scheduler.check()
            harness.run()
            harness.assert_expected()


def test_a_budget_smaller_than_a_generation_does_not_split_what_advance_sees() -> None:
    harness = Harness(200, 4, 12, 16)  # resuming 8 beams of 20 tokens takes many steps of 16 tokens
    name = harness.add(prompt(6), BeamToyParams(width=8, max_tokens=20))
    for _ in range(14):
        harness.step()
    harness.scheduler.residents._preempt(harness.scheduler._by_id[name])
    harness.run()
    harness.assert_expected()


def test_plans_and_results_are_plain_data() -> None:
    """A plan crosses a wire as msgpack and computes the same on the other side."""

    def encode(value: Any) -> Any:
        return (value.dtype.str, value.shape, value.tobytes())

    def decode(kind: Any, value: Any) -> Any:
        return np.frombuffer(value[2], value[0]).reshape(value[1])

    harness = Harness(100, 4, 12, 24)
    for seed in range(4):
        harness.add(prompt(30, seed), SamplingParams(n=2, max_tokens=6, frequency_penalty=0.5))
        harness.add(prompt(30, seed), BeamToyParams(max_tokens=6))
    submit = harness.runner.submit

    def far(plan: Plan) -> None:
        wire = msgspec.msgpack.encode(plan, enc_hook=encode)
        submit(msgspec.msgpack.decode(wire, type=Plan, dec_hook=decode))

    harness.runner.submit = far  # type: ignore[method-assign]
    harness.run()
    harness.assert_expected()

"""Any order of adding, stepping, forking, dropping, aborting, answering and preempting keeps every promise.

The promises: outputs equal those of a model that knows no blocks; every block, slot and sequence is accounted
for after every step; one terminal per request; nothing is held at the end.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.harness import Harness
from support.oracle import VOCAB
from support.toys import BeamToyParams, ForkToyParams, LookToyParams, RolloutToyParams

from pagefork.scheduler.errors import KVExhaustedError
from pagefork.scheduler.params import CommonParams, SamplingParams

PREFIXES = [[t % VOCAB for t in range(seed, seed + 60)] for seed in (3, 5)]


@st.composite
def params(draw: st.DrawFn) -> CommonParams:
    count = draw(st.integers(1, 20))
    penalty = draw(st.sampled_from([0.0, 0.5]))
    match draw(st.sampled_from(["sample", "sample", "greedy", "beam", "look", "rollout", "fork"])):
        case "sample":
            return SamplingParams(n=draw(st.integers(1, 4)), max_tokens=count, frequency_penalty=penalty)
        case "greedy":
            return SamplingParams(temperature=0, max_tokens=count, frequency_penalty=penalty)
        case "beam":
            return BeamToyParams(width=draw(st.integers(1, 5)), max_tokens=count, frequency_penalty=penalty)
        case "fork":
            return ForkToyParams(branch=draw(st.integers(1, 3)), max_tokens=count, frequency_penalty=penalty)
        case "rollout":
            return RolloutToyParams(
                branch=draw(st.integers(1, 3)), depth=draw(st.integers(1, 6)), max_tokens=draw(st.integers(1, 6))
            )
        case _:
            return LookToyParams(branch=draw(st.integers(1, 4)), max_tokens=count, frequency_penalty=penalty)


class SchedulerMachine(RuleBasedStateMachine):
    harness: Harness

    @initialize(
        blocks=st.integers(20, 60),
        size=st.sampled_from([1, 3, 4]),
        budget=st.integers(8, 40),
        lag=st.integers(0, 1),
        caching=st.booleans(),
    )
    def start(self, blocks: int, size: int, budget: int, lag: int, caching: bool) -> None:
        self.harness = Harness(blocks * (4 if size == 1 else 1), size, 12, budget, lag=lag, enable_prefix_caching=caching)
        self.harness.answer_at_once = False

    @rule(
        prefix=st.sampled_from([0, 1]), shared=st.integers(0, 40),
        own=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), params=params(),
        stop=st.booleans(), priority=st.integers(0, 2), scored=st.sampled_from([None, None, 0, 2]),
    )  # fmt: skip
    def add(
        self, prefix: int, shared: int, own: list[int], params: CommonParams, stop: bool, priority: int, scored: int | None
    ) -> None:
        stops = frozenset([3, 11]) if stop and isinstance(params, SamplingParams) else frozenset()
        try:
            self.harness.add(PREFIXES[prefix][:shared] + own, params, stops, priority=priority, prompt_logprobs=scored)
        except ValueError as error:
            assert "raise" in str(error)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @precondition(lambda self: self.harness.asks)
    @rule()
    def answer(self) -> None:
        self.harness.answer()

    @precondition(lambda self: self.harness.scheduler.has_unfinished)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        self.harness.abort(data.draw(st.sampled_from(sorted(self.harness.scheduler._by_id))))
        self.harness.scheduler.check()

    @precondition(lambda self: self.harness.scheduler.num_running > 1)
    @rule()
    def press(self) -> None:
        """Memory pressure out of the blue: the youngest running group loses its blocks."""
        residents = self.harness.scheduler.residents
        residents._preempt(max(residents.running.values(), key=lambda group: group.order))
        self.harness.scheduler.check()

    @precondition(lambda self: self.harness.scheduler.has_unfinished)
    @rule(data=st.data())
    def evict_parked(self, data: Any) -> None:
        """Parked sequences lose their blocks one by one."""
        self.harness.scheduler.residents._shed(data.draw(st.integers(1, 60)))
        self.harness.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.run()
            self.harness.assert_expected(KVExhaustedError)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@pytest.mark.long
class TestSchedulerLong(SchedulerMachine.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=5000, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck))

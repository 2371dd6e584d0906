"""Any order of adding, stepping, forking, dropping, aborting, answering and preempting keeps every promise.

The promises: outputs equal those of a model that knows no blocks; every block, slot and sequence is accounted
for after every step; one terminal per request; nothing is held at the end. It is seen to that all of it occurred.
"""

from __future__ import annotations

from collections import Counter
from operator import attrgetter
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from support.oracle import VOCAB
from support.searches_alone import hashed
from support.toys import BeamToyParams, ForkToyParams, LookToyParams, RolloutToyParams
from support.watched import SITUATIONS, Watched, kinds

from pagefork.scheduler.errors import KVExhaustedError, ValueFunctionError
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams

PREFIXES = [[t % VOCAB for t in range(seed, seed + 60)] for seed in (3, 5)]
STRATEGIES = ["sample", "greedy", "toy", "beam", "beam", "contrastive", "mcts", "mcts", "mcts"]

SEARCHES: list[CommonParams] = [
    BeamSearchParams(beam_width=6, n=3, max_tokens=16),
    BeamSearchParams(beam_width=6, n=3, max_tokens=16, num_beam_groups=2, diversity_penalty=0.5),
    ContrastiveSearchParams(max_tokens=16),
    MCTSParams(num_simulations=24, top_k=4, max_tokens=8, leaf_batch_size=4, rollout_tokens=3),
]


@st.composite
def params(draw: st.DrawFn) -> CommonParams:
    count = draw(st.integers(1, 16))
    penalty = draw(st.sampled_from([0.0, 0.5]))
    match draw(st.sampled_from(STRATEGIES)):
        case "sample":
            return SamplingParams(n=draw(st.integers(1, 4)), max_tokens=count, frequency_penalty=penalty)
        case "greedy":
            return SamplingParams(temperature=0, max_tokens=count, frequency_penalty=penalty)
        case "toy":
            return draw(toys(count))
        case "contrastive":
            return ContrastiveSearchParams(
                top_k=draw(st.integers(1, 5)), alpha=draw(st.sampled_from([0.1, 0.6])), window=draw(st.sampled_from([None, 3])),
                adaptive=draw(st.booleans()), max_tokens=count, frequency_penalty=penalty,
            )  # fmt: skip
        case "mcts":
            n = draw(st.sampled_from([1, 1, 2]))
            return MCTSParams(
                num_simulations=draw(st.integers(1, 16)), top_k=draw(st.integers(1, 4)), max_depth=draw(st.integers(1, 3)),
                leaf_batch_size=draw(st.integers(1, 4)), rollout_tokens=draw(st.sampled_from([0, 0, 2])), n=n,
                selection=draw(st.sampled_from(["puct", "ucb1"])), value_fn=draw(st.sampled_from([None, hashed])),
                reuse_tree=draw(st.booleans()), visit_temperature=float(n - 1), max_tokens=1 + count // 3,
                frequency_penalty=penalty,
            )  # fmt: skip
        case _:
            groups = draw(st.sampled_from([1, 1, 2]))
            width = groups * draw(st.integers(1, 6 // groups))
            return BeamSearchParams(
                beam_width=width, n=draw(st.integers(1, width)), num_beam_groups=groups, diversity_penalty=0.5 * (groups - 1),
                early_stopping=draw(st.sampled_from([False, True, "never"])), max_tokens=count, frequency_penalty=penalty,
            )  # fmt: skip


def toys(count: int) -> st.SearchStrategy[CommonParams]:
    return st.sampled_from([
        BeamToyParams(width=1 + count % 5, max_tokens=count), ForkToyParams(branch=1 + count % 3, max_tokens=count),
        RolloutToyParams(branch=1 + count % 3, depth=1 + count % 6, max_tokens=1 + count % 6),
        LookToyParams(branch=1 + count % 4, max_tokens=count),
    ])  # fmt: skip


class SchedulerMachine(RuleBasedStateMachine):
    seen: ClassVar[Counter[str]] = Counter()
    harness: Watched

    @initialize(
        blocks=st.integers(14, 60),
        size=st.sampled_from([1, 2, 3, 4]),
        budget=st.integers(8, 30),
        lag=st.integers(0, 1),
        caching=st.booleans(),
    )
    def start(self, blocks: int, size: int, budget: int, lag: int, caching: bool) -> None:
        count = blocks * (4 if size == 1 else 1)
        self.harness = Watched(self.seen, count, size, 12, budget, lag=lag, enable_prefix_caching=caching)
        self.harness.answer_at_once = False

    @rule(
        prefix=st.sampled_from([0, 1]), shared=st.integers(0, 40), own=st.integers(0, 2**32 - 1), params=params(),
        stop=st.booleans(), priority=st.integers(0, 2), scored=st.sampled_from([None, None, 0, 2]),
    )  # fmt: skip
    def add(
        self, prefix: int, shared: int, own: int, params: CommonParams, stop: bool, priority: int, scored: int | None
    ) -> None:
        toy = isinstance(params, BeamToyParams | ForkToyParams | RolloutToyParams | LookToyParams)
        stops = frozenset([3, 11]) if stop and not toy else frozenset()
        prompt = PREFIXES[prefix][:shared] + [own // VOCAB**i % VOCAB for i in range(1 + own % 7)]
        try:
            self.harness.add(prompt, params, stops, priority=priority, prompt_logprobs=scored)
        except ValueError as error:
            assert "raise" in str(error)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @precondition(lambda self: self.harness.asks)
    @rule(count=st.integers(1, 3))
    def answer(self, count: int) -> None:
        for _ in range(min(count, len(self.harness.asks))):
            self.harness.answer()

    @precondition(lambda self: self.harness.asks)
    @rule()
    def fail(self) -> None:
        self.harness.fail()

    @precondition(lambda self: len(self.harness.scheduler._by_id) > 3 or self.harness.asked())
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        self.harness.abort(data.draw(st.sampled_from(self.harness.asked() or sorted(self.harness.scheduler._by_id))))

    @precondition(lambda self: self.harness.scheduler.num_running)
    @rule(which=st.sampled_from(["live", "order", "asked"]))
    def press(self, which: str) -> None:
        """Memory pressure out of the blue: a running group loses its blocks, the widest, the youngest or one that asks."""
        running = self.harness.scheduler.residents.running.values()
        self.harness.preempt(max(running, key=attrgetter(which)))

    @precondition(lambda self: self.harness.between_parts())
    @rule(aborted=st.booleans())
    def disturb(self, aborted: bool) -> None:
        """The same, or an abort, to a group of which a part of a generation has been read."""
        group = self.harness.between_parts()[0]
        if aborted:
            self.harness.abort(group.request.id)
        else:
            self.harness.preempt(group)

    @precondition(lambda self: self.harness.scheduler.has_unfinished)
    @rule(wanted=st.integers(1, 60))
    def evict_parked(self, wanted: int) -> None:
        """Parked sequences lose their blocks one by one."""
        self.harness.scheduler.residents._shed(wanted)
        self.harness.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.run()
            self.harness.assert_expected(KVExhaustedError, ValueFunctionError)


def run(examples: int, steps: int, **options: Any) -> None:
    """In rounds, until everything that can happen did: which examples are drawn changes with the sources that are loaded."""
    SchedulerMachine.seen.clear()
    missing = list(SITUATIONS)
    for again in range(4):
        if missing:
            machine = type(f"{SchedulerMachine.__name__}{again}", (SchedulerMachine,), {})  # by its name it has other examples
            checks = list(HealthCheck)
            chosen = settings(
                max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks, **options
            )
            run_state_machine_as_test(machine, settings=chosen)
        missing = [situation for situation in SITUATIONS if not SchedulerMachine.seen[situation]]
    assert not missing, f"this did not occur: {', '.join(missing)}"


def test_any_order_of_events_keeps_every_promise_and_nothing_that_can_happen_is_left_out() -> None:
    run(150, 60, derandomize=True, phases=[Phase.explicit, Phase.generate])


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: kinds(search)[0])
def test_what_comes_between_the_parts_of_a_generation_changes_nothing(search: CommonParams, lag: int, aborted: bool) -> None:
    """The rows of what was preempted are longer than a step: it is preempted again, or aborted, when a part has been read."""
    seen: Counter[str] = Counter()
    harness = Watched(seen, 300, 3, 12, 13, lag=lag)
    for seed in range(3):
        harness.add(PREFIXES[0][: 10 + seed], search)
    disturbed = 0
    for at in range(200):
        parted = harness.between_parts()
        if parted and disturbed < 3:
            disturbed += 1
            if aborted:
                harness.abort(parted[0].request.id)
            else:
                harness.preempt(parted[0])
        elif at % 8 == 7 and harness.scheduler.num_running:
            harness.preempt(max(harness.scheduler.residents.running.values(), key=lambda group: group.live))
        harness.step()
    harness.run()
    harness.assert_expected()
    what = "abort" if aborted else "preemption"
    assert seen[f"{kinds(search)[0]}: {what} between parts"] > 1


@pytest.mark.long
def test_any_order_of_many_more_events() -> None:
    run(5000, 80)

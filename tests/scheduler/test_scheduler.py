"""What the scheduler promises about sharing, order, pressure and failure, one property each, on the oracle runner."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from support.harness import Harness
from support.oracle import VOCAB, continuation
from support.toys import BeamToyParams, LookToyParams, RolloutToyParams

from pagefork.scheduler.errors import (
    EngineMisuseError,
    InvalidRequestError,
    KVExhaustedError,
    NumericError,
    ParameterError,
    StepFailedError,
)
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.plan import Kind, Plan, Result
from pagefork.scheduler.strategies.base import Base, Drop, Emit, Finish, Footprint, Grow, Read, register

GREEDY = SamplingParams(temperature=0, max_tokens=8)
GROUPS = [
    SamplingParams(n=3, max_tokens=12),
    BeamToyParams(max_tokens=9),
    LookToyParams(max_tokens=9),
    RolloutToyParams(depth=6, max_tokens=4),
]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def plans(harness: Harness) -> list[Plan]:
    """Run to the end; every plan that was submitted."""
    seen: list[Plan] = []
    submit = harness.runner.submit
    harness.runner.submit = lambda plan: (seen.append(plan), submit(plan))[1]  # type: ignore[method-assign, func-returns-value]
    harness.run()
    harness.assert_expected()
    return seen


def test_n_sequences_fork_in_the_plan_of_the_last_prompt_chunk_and_copy_one_block_each_but_the_first() -> None:
    harness = Harness(100, 4, 12, 24)
    harness.add(prompt(42), SamplingParams(n=5, max_tokens=3))
    seen = plans(harness)
    assert [len(plan.rows.tokens) for plan in seen] == [24, 18, 5, 5]
    sample = seen[1].probes[0]
    assert sample.kind is Kind.SAMPLE and sample.at.tolist() == [17] * 5 and len(set(sample.slot.tolist())) == 5
    assert [len(plan.copies.dst) for plan in seen] == [0, 0, 4, 0]
    assert set(seen[2].copies.src.tolist()) == {seen[2].copies.src[0]}


def test_forked_sequences_hold_the_prompt_once() -> None:
    harness = Harness(100, 4, 12, 200)
    harness.add(prompt(40), SamplingParams(n=8, max_tokens=20))
    harness.step()
    harness.step()
    assert 99 - harness.scheduler.kv.pool.free == 40 // 4 + 8


def test_no_full_block_is_ever_copied() -> None:
    harness = Harness(200, 4, 12, 40)
    for seed in range(6):
        harness.add(prompt(13 + seed, seed), BeamToyParams(width=4, max_tokens=15))
        harness.add(prompt(13 + seed, seed), SamplingParams(n=4, max_tokens=15))
    filled: list[int] = []
    submit = harness.runner.submit

    def watched(plan: Plan) -> None:
        for slot, start in zip(plan.rows.slot, plan.rows.start, strict=True):
            if harness.runner.table[slot, start // 4] in plan.copies.src:
                filled.append(start % 4)
        submit(plan)

    harness.runner.submit = watched  # type: ignore[method-assign]
    harness.run()
    assert filled and all(filled)


def test_a_published_block_is_not_written_again_by_a_sequence_that_stands_in_the_middle_of_it() -> None:
    """A rollout fills and publishes the block its root stands in, and goes; the root alone holds it and goes on."""
    for seed in range(8):
        harness = Harness(200, 4, 12, 64)
        for _ in range(2):  # the second run finds what the first one published
            harness.add(prompt(9, seed), RolloutToyParams(branch=3, depth=8, max_tokens=4))
            harness.run()
        harness.assert_expected()


def test_a_repeated_prompt_computes_only_what_the_cache_lacks() -> None:
    harness = Harness(100, 4, 12, 64)
    harness.add(prompt(41), GREEDY)
    harness.run()
    before = harness.scheduler.counters.forward_tokens
    harness.add(prompt(41), GREEDY)
    harness.run()
    harness.assert_expected()
    assert harness.scheduler.counters.forward_tokens - before == 1 + 7


def test_a_prompt_that_is_cached_to_its_last_token_still_computes_one() -> None:
    harness = Harness(100, 4, 12, 64)
    for _ in range(2):
        harness.add(prompt(40), GREEDY)
        harness.run()
    harness.assert_expected()


def test_salts_separate_prefix_caches() -> None:
    harness = Harness(100, 4, 12, 64)
    for salt in ("a", "b", "a"):
        harness.add(prompt(40), GREEDY, salt=salt)
        harness.run()
    assert harness.scheduler.residents.prefix_hits == 36


def test_equal_prompts_that_run_together_end_up_on_the_same_blocks() -> None:
    harness = Harness(100, 4, 12, 200)
    for _ in range(2):
        harness.add(prompt(40), SamplingParams(temperature=0, max_tokens=20))
    for _ in range(3):
        harness.step()
    assert 99 - harness.scheduler.kv.pool.free == 40 // 4 + 2


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


def test_a_request_that_can_never_run_is_refused_with_the_setting_to_change() -> None:
    harness = Harness(20, 4, 12, 200)
    with pytest.raises(InvalidRequestError, match=r"13 sequences.*max_num_seqs allows 12"):
        harness.scheduler.validate(_request(harness, prompt(4), SamplingParams(n=13)))
    with pytest.raises(InvalidRequestError, match=r"needs 21 cache blocks.*the cache has 19"):
        harness.scheduler.validate(_request(harness, prompt(80), SamplingParams()))
    harness.add(prompt(4), GREEDY)
    with pytest.raises(InvalidRequestError, match="'0' is in use"):
        harness.scheduler.add(_request(harness, prompt(4), SamplingParams()))
    harness.run()


def test_a_group_alone_that_fills_the_cache_ends_with_a_typed_error_and_the_next_one_runs() -> None:
    harness = Harness(20, 4, 12, 64)
    wide = harness.add(prompt(8), SamplingParams(n=6, max_tokens=40))
    later = harness.add(prompt(8, 1), GREEDY)
    harness.run()
    assert isinstance(harness.requests[wide].error, KVExhaustedError)
    assert set(harness.requests[wide].reasons.values()) == {"error"}
    assert harness.requests[later].error is None
    harness.assert_expected(KVExhaustedError)


def test_nan_rows_end_their_request_alone_and_leave_the_prefix_cache() -> None:
    harness = Harness(100, 4, 12, 64)
    bad = harness.add(prompt(20), GREEDY)
    good = harness.add(prompt(20, 1), GREEDY)
    collect = harness.runner.collect

    def poisoned() -> Result:
        result = collect()
        result.reads[0].bad[0] = harness.runner.spec[0] is not None and result.step == 3
        return result

    harness.runner.collect = poisoned  # type: ignore[method-assign]
    harness.run()
    assert isinstance(harness.requests[bad].error, NumericError)
    assert harness.requests[good].error is None
    hits = harness.scheduler.residents.prefix_hits
    harness.add(prompt(20), GREEDY)
    harness.run()
    harness.assert_expected(NumericError)
    assert harness.scheduler.residents.prefix_hits == hits


def test_a_step_that_raises_ends_the_requests_it_computed_and_nobody_else() -> None:
    harness = Harness(100, 4, 1, 64)
    harness.add(prompt(20), GREEDY)
    harness.add(prompt(20, 1), GREEDY)
    assert harness.scheduler.schedule() is not None
    harness.take(harness.scheduler.abandon(ValueError("device on fire")))
    assert isinstance(harness.requests["0"].error, StepFailedError)
    harness.run()
    harness.assert_expected(StepFailedError)
    assert harness.requests["1"].reasons == {0: "length"}


class BrokenParams(CommonParams, frozen=True, kw_only=True):
    where: str


@register
class Broken(Base):
    """Fails where it is told to."""

    params = BrokenParams
    lockstep = False

    def __init__(self, request: Any) -> None:
        self.where = request.params.where

    def footprint(self) -> Footprint:
        return Footprint(2)

    def probe(self, group: Any, seqs: Any) -> list[Read]:
        if self.where == "probe":
            raise RuntimeError("broken in probe")
        return [Read(Kind.TOPN, seqs, n=1)]

    def advance(self, group: Any, seqs: Any, reads: Any) -> list[Any]:
        if self.where == "advance":
            raise RuntimeError("broken in advance")
        if self.where == "wide":
            return [Grow([int(seqs[0])] * 20, [1] * 20, group.fresh(20))]
        return []  # neither a row, an Ask nor a Finish


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("probe", "broken in probe"),
        ("advance", "broken in advance"),
        ("hang", "no sequence to run"),
        ("wide", "than its footprint"),
    ],
)
def test_a_broken_strategy_ends_its_own_request_loudly(where: str, message: str) -> None:
    harness = Harness(100, 4, 12, 64)
    broken = harness.add(prompt(20), BrokenParams(where=where, max_tokens=5))
    other = harness.add(prompt(20, 1), GREEDY)
    harness.run()
    assert isinstance(harness.requests[broken].error, StepFailedError)
    assert message in str(harness.requests[broken].error)
    assert harness.requests[other].error is None
    harness.assert_expected(StepFailedError)


class SplitParams(CommonParams, frozen=True, kw_only=True):
    """Draws one token, then goes on from it with two streams."""


@register
class Split(Base):
    params = SplitParams
    lockstep = False

    def __init__(self, request: Any) -> None:
        self.length = request.room
        self.tokens: dict[int, list[int]] = {}

    def footprint(self) -> Footprint:
        return Footprint(2, 2)

    def probe(self, group: Any, seqs: Any) -> list[Read]:
        return [Read(Kind.SAMPLE, seqs)]

    def advance(self, group: Any, seqs: Any, reads: Any) -> list[Any]:
        drawn = {int(seq): reads[0].token[reads[0].begin + i] for i, seq in enumerate(seqs)}
        if not self.tokens:
            (root, token), fork = drawn.popitem(), group.fresh(1)[0]
            self.tokens = {root: [token], fork: [token]}
            return [Grow([root, root], [token, token], [root, fork], stream=[0, 9])]
        edits: list[Any] = []
        for index, (seq, tokens) in enumerate(self.tokens.items()):
            if seq in drawn:
                tokens.append(drawn[seq])
                edits.append(Grow([seq], [drawn[seq]], [seq]))
                if len(tokens) == self.length:
                    edits[-1:] = [Drop([seq]), Emit(index, tokens, [0.0] * self.length), Finish(index, "length")]
        return edits


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_fork_of_a_live_sequence_draws_from_the_stream_it_was_given_and_has_its_history(penalty: float) -> None:
    harness = Harness(100, 4, 12, 64)
    name = harness.add(prompt(9), SplitParams(max_tokens=7, frequency_penalty=penalty))
    spec = harness.scheduler._by_id[name].request.spec = msgspec.structs.replace(
        harness.scheduler._by_id[name].request.spec, temperature=1.0
    )
    harness.run()
    first, second = harness.requests[name].tokens
    assert first == continuation(prompt(9), spec, 0, 7)
    assert second == first[:1] + continuation(prompt(9) + first[:1], spec, 9, 6)
    assert first != second


def test_results_out_of_order_and_too_many_plans_are_refused() -> None:
    harness = Harness(100, 4, 12, 64)
    harness.add(prompt(5), GREEDY)
    plan = harness.scheduler.schedule()
    assert plan is not None
    with pytest.raises(EngineMisuseError, match="plans are out"):
        harness.scheduler.schedule()
    with pytest.raises(EngineMisuseError, match="in order"):
        harness.scheduler.apply(Result(plan.step + 1, []))


def test_params_without_a_strategy_are_refused_by_name() -> None:
    class Unknown(CommonParams, frozen=True, kw_only=True):
        pass

    harness = Harness()
    with pytest.raises(ParameterError, match=r"Unknown.*SamplingParams"):
        harness.add(prompt(5), Unknown())


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


def _request(harness: Harness, tokens: list[int], params: CommonParams) -> Any:
    from pagefork.scheduler.plan import Spec
    from pagefork.scheduler.request import Request

    return Request("0", np.array(tokens, np.int32), params, Spec(prompt_len=len(tokens)), len(tokens) + 16)

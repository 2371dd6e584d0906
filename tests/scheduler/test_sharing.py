"""Which blocks sequences share, which they copy, and what the prefix cache finds."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from support.harness import Harness
from support.oracle import continuation
from support.requests import GREEDY, prompt
from support.toys import BeamToyParams, RolloutToyParams

from pagefork.scheduler.kv_manager import KVManager, Written
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.plan import Ints, Kind, Plan, ints
from pagefork.scheduler.strategies.base import Base, Drop, Emit, Finish, Footprint, Grow, Read, register


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


def test_a_block_that_all_its_holders_copy_is_not_given_out_in_the_plan_that_copies_it() -> None:
    """A third one filled it and has gone; only once the plan is sealed nobody holds it."""
    kv = KVManager(4, 4, enable_prefix_caching=False)
    first, second, third = (ints(kv.table.allocate(1, 0)) for _ in range(3))

    def write(seqs: Ints, start: int, end: int) -> Written:
        rows = seqs, np.full(len(seqs), start, np.int32), np.full(len(seqs), end, np.int32)
        return kv.write(*rows, kv.needs(*rows))

    (block,) = write(first, 0, 2).block
    for fork in (second, third):
        kv.fork(first, fork)
    assert len(write(third, 2, 3).block) == 0
    kv.drop(third)
    written = write(np.concatenate([first, second]), 2, 3)
    assert written.src.tolist() == [block, block] and kv.pool.free == 0
    assert block not in written.dst and written.dst[0] != written.dst[1]
    kv.settle(written)
    assert kv.pool.free == 1


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

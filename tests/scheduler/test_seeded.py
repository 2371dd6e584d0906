"""Long seeded runs of mixed strategies under pressure: the same promises as the state machine, more steps."""

from __future__ import annotations

import random

import pytest
from support.harness import Harness
from support.oracle import VOCAB
from support.toys import BeamToyParams, LookToyParams, RolloutToyParams

from pagefork.scheduler.errors import KVExhaustedError
from pagefork.scheduler.params import CommonParams, SamplingParams


def some_params(rng: random.Random) -> CommonParams:
    count, penalty = rng.randint(1, 24), rng.choice([0.0, 0.5])
    kind = rng.random()
    if kind < 0.5:
        return SamplingParams(n=rng.choice([1, 1, 2, 3, 4]), max_tokens=count, frequency_penalty=penalty)
    if kind < 0.65:
        return SamplingParams(temperature=0, max_tokens=count, frequency_penalty=penalty)
    if kind < 0.8:
        return BeamToyParams(width=rng.randint(1, 5), max_tokens=count, frequency_penalty=penalty)
    if kind < 0.9:
        return RolloutToyParams(branch=rng.randint(1, 3), depth=rng.randint(1, 6), max_tokens=rng.randint(1, 8))
    return LookToyParams(branch=rng.randint(1, 4), max_tokens=count, frequency_penalty=penalty)


def soak(seed: int, steps: int) -> Harness:
    """Random requests, aborts and late answers for `steps` steps, then run dry."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4, 5])
    harness = Harness(
        160 // size, size, 12, rng.randint(16, 40), lag=rng.randint(0, 1), enable_prefix_caching=rng.random() < 0.8,
        policy=rng.choice(["fcfs", "priority"]),
    )  # fmt: skip
    harness.answer_at_once = False
    prefixes = [[rng.randrange(VOCAB) for _ in range(40)] for _ in range(3)]
    for _ in range(steps):
        if rng.random() < 0.3:
            prompt = rng.choice(prefixes)[: rng.randrange(40)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 10))]
            params = some_params(rng)
            stops = frozenset([3]) if isinstance(params, SamplingParams) and rng.random() < 0.4 else frozenset()
            scored = rng.choice([None, None, None, 0, 3])
            harness.add(prompt, params, stops, priority=rng.randrange(3), prompt_logprobs=scored)
        if rng.random() < 0.03 and harness.scheduler.has_unfinished:
            harness.abort(rng.choice(sorted(harness.scheduler._by_id)))
        if harness.asks and rng.random() < 0.5:
            harness.answer()
        harness.step()
    harness.run()
    harness.assert_expected(KVExhaustedError)
    return harness


@pytest.mark.parametrize("seed", range(20))
def test_mixed_load_in_a_small_cache_gives_everyone_the_tokens_it_gets_alone(seed: int) -> None:
    harness = soak(seed, 300)
    assert len(harness.requests) > 50


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_the_same_over_many_more_steps(seed: int) -> None:
    soak(seed, 5000)

"""Log-probs of prompt tokens: each once, from all tokens before it, whatever chunks, cached blocks and preemption do."""

from __future__ import annotations

import pytest
from support.harness import Harness
from support.requests import GREEDY, prompt

from pagefork.scheduler.errors import NumericError
from pagefork.scheduler.params import SamplingParams


@pytest.mark.parametrize("budget", [2, 7, 24, 200])
@pytest.mark.parametrize("lag", [0, 1])
def test_chunks_score_every_token_once(budget: int, lag: int) -> None:
    harness = Harness(100, 4, 12, budget, lag=lag)
    harness.add(prompt(42), GREEDY, prompt_logprobs=3)
    harness.add(prompt(30, 1), GREEDY, prompt_logprobs=0)
    harness.add(prompt(9, 2), GREEDY)
    harness.run()
    harness.assert_expected()


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    harness = Harness()
    harness.add([5], GREEDY, prompt_logprobs=1)
    harness.run()
    harness.assert_expected()


def test_cached_blocks_are_computed_again_where_they_have_to_be_scored_and_are_shared_afterwards() -> None:
    harness = Harness(100, 4, 12, 200)
    for scored in (None, 0, None):
        harness.add(prompt(40), GREEDY, prompt_logprobs=scored)
        harness.run()
    harness.assert_expected()
    assert harness.scheduler.residents.prefix_hits == 36, "of the third request; the second had to be computed"
    held = Harness(100, 4, 12, 200)
    held.add(prompt(40), SamplingParams(temperature=0, max_tokens=50))
    held.step()
    held.add(prompt(40), SamplingParams(temperature=0, max_tokens=50), prompt_logprobs=0)
    for _ in range(3):
        held.step()
    assert 99 - held.scheduler.kv.pool.free < 20, "equal blocks of the two are one"


def test_a_preempted_prompt_goes_on_from_the_last_token_that_was_scored() -> None:
    harness = Harness(100, 4, 12, 10)
    harness.add(prompt(42), GREEDY, prompt_logprobs=2)
    for _ in range(2):
        harness.step()
    residents = harness.scheduler.residents
    residents._preempt(next(iter(residents.running.values())))
    before = harness.scheduler.counters.forward_tokens
    harness.run()
    harness.assert_expected()
    assert harness.scheduler.counters.forward_tokens - before < 42, "what was scored is taken from the cache"


def test_preemption_while_a_scoring_step_is_in_flight_loses_no_score() -> None:
    harness = Harness(100, 4, 12, 10, lag=1, enable_prefix_caching=False)
    harness.add(prompt(42), GREEDY, prompt_logprobs=2)
    harness.add(prompt(42, 1), GREEDY, prompt_logprobs=2)
    for _ in range(3):
        harness.step()
        residents = harness.scheduler.residents
        residents._preempt(next(iter(residents.running.values())))
    harness.run()
    harness.assert_expected()


def test_a_bad_row_in_the_prompt_ends_its_request_alone() -> None:
    harness = Harness(100, 4, 12, 10)
    harness.add(prompt(42), GREEDY, prompt_logprobs=2)
    harness.runner.poison = {1}
    harness.run()
    harness.add(prompt(42), GREEDY, prompt_logprobs=2)
    harness.run()
    assert isinstance(harness.requests["0"].error, NumericError) and len(harness.requests["0"].scored or ()) == 10
    harness.assert_expected(NumericError)

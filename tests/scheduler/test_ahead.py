"""How many plans may stay out while the next is made."""

from __future__ import annotations

import pytest
from support.harness import Harness
from support.requests import GREEDY, prompt
from support.toys import BeamToyParams, LookToyParams

from pagefork.scheduler.params import CommonParams, SamplingParams


def scheduled(*params: CommonParams, lag: int) -> Harness:
    """A harness whose first plan is out."""
    harness = Harness(lag=lag)
    for number, request in enumerate(params):
        harness.add(prompt(3, number), request)
    assert harness.scheduler.schedule() is not None
    return harness


@pytest.mark.parametrize("lag", [0, 1])
def test_samplers_go_on_before_they_are_read(lag: int) -> None:
    assert scheduled(GREEDY, SamplingParams(n=3, max_tokens=8), lag=lag).scheduler.ahead == lag


@pytest.mark.parametrize("search", [BeamToyParams(max_tokens=9), LookToyParams(max_tokens=9)])
def test_a_search_in_the_plan_is_read_at_once(search: CommonParams) -> None:
    assert scheduled(GREEDY, search, GREEDY, lag=1).scheduler.ahead == 0


def test_without_a_plan_out_the_next_may_stay_out() -> None:
    assert Harness(lag=1).scheduler.ahead == 1

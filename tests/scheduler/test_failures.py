"""What can't run is refused, what fails ends alone, and both say why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.harness import Harness
from support.requests import GREEDY, prompt

from pagefork.scheduler.errors import (
    EngineMisuseError,
    InvalidRequestError,
    KVExhaustedError,
    NumericError,
    ParameterError,
    StepFailedError,
)
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.plan import Kind, Result
from pagefork.scheduler.strategies.base import Base, Footprint, Grow, Read, register


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


def _request(harness: Harness, tokens: list[int], params: CommonParams) -> Any:
    from pagefork.scheduler.plan import Spec
    from pagefork.scheduler.request import Request

    return Request("0", np.array(tokens, np.int32), params, Spec(prompt_len=len(tokens)), len(tokens) + 16)


LATE = """
import resource
from support.harness import Harness
from support.requests import GREEDY, prompt
harness, tokens = Harness(20, 4, 12, 64), prompt(4)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
harness.add(tokens, GREEDY)
harness.run()
"""


def test_the_first_request_opens_no_file() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", LATE], check=True, timeout=60, env=environment)


def test_aborted_requests_leave_the_queue() -> None:
    harness = Harness(40, 4, 4, 24)
    harness.add(prompt(9), SamplingParams(n=4, max_tokens=30))
    harness.step()
    for name in [harness.add(prompt(9), SamplingParams(n=4, max_tokens=3)) for _ in range(200)]:
        harness.abort(name)
    assert len(harness.scheduler.residents.waiting._heap) < 20
    harness.run()
    harness.assert_expected()

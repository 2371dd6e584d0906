"""A runner in a thread of its own: the order of what comes back, what it shares with its user, and when the thread ends."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from support.oracle_engine import OracleEngine

from pagefork import AsyncLLMEngine, EngineConfig, LLMEngine, SamplingParams
from pagefork.overlap import ThreadedRunner
from pagefork.scheduler.plan import Plan, Result

PROMPT = "import os\n\n\ndef "
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Counting:
    """A runner that computes nothing; it tells of its thread, and raises at every third plan."""

    processors: Any = None

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.open = threading.Event()
        self.open.set()
        self._step = 0

    def submit(self, plan: Plan) -> None:
        self.open.wait(10)
        self._step = plan.step
        self.seen.append((threading.current_thread().name, torch.get_num_threads()))
        if plan.step % 3 == 2:
            raise ValueError(f"step {plan.step}")

    def collect(self) -> Result:
        return Result(self._step, [])

    def reset(self) -> None:
        self.seen.clear()


class Numbers:
    """Logits processors that are known."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def register(self, number: int, prompt_len: int, processors: Any) -> None:
        self.known.add(number)

    def forget(self, number: int) -> None:
        self.known.remove(number)


def plan_of(step: int) -> Plan:
    engine = OracleEngine()
    engine.add_request("a", [1], GREEDY)
    plan = engine._scheduler.schedule()
    assert plan is not None
    plan.step = step
    return plan


@pytest.fixture
def counting() -> Any:
    """A runner, and one with a thread around it."""
    inner = Counting()
    inner.processors = Numbers()
    return inner, ThreadedRunner(inner)


def test_results_and_errors_of_a_thread_come_in_order(counting: Any) -> None:
    _, runner = counting
    for step in range(6):
        runner.submit(plan_of(step))
    for step in range(6):
        if step % 3 == 2:
            with pytest.raises(ValueError, match=f"step {step}"):
                runner.collect()
        else:
            assert runner.collect().step == step


def test_the_thread_computes_with_as_many_of_torchs_threads_as_its_user(counting: Any) -> None:
    inner, runner = counting
    before = torch.get_num_threads()
    try:
        for threads in (3, 1, 2):
            torch.set_num_threads(threads)
            runner.submit(plan_of(0))
            runner.collect()
    finally:
        torch.set_num_threads(before)
    assert inner.seen == [("pagefork-runner", threads) for threads in (3, 1, 2)]


def test_processors_stay_known_until_the_plans_that_may_name_them_are_computed(counting: Any) -> None:
    inner, runner = counting
    inner.open.clear()
    runner.processors.register(7, 1, ())
    assert inner.processors.known == {7}
    runner.submit(plan_of(0))
    runner.processors.forget(7)
    runner.processors.forget(0)
    assert inner.processors.known == {7}
    inner.open.set()
    runner.collect()
    runner.submit(plan_of(1))
    runner.collect()
    assert inner.processors.known == set()


def test_a_reset_waits_for_what_is_under_way_and_drops_it(counting: Any) -> None:
    inner, runner = counting
    inner.open.clear()
    runner.submit(plan_of(0))
    runner.submit(plan_of(1))
    threading.Timer(0.05, inner.open.set).start()
    runner.reset()
    assert inner.seen == []
    runner.submit(plan_of(3))
    assert runner.collect().step == 3


def test_a_thread_begins_with_the_first_plan_and_ends_with_its_engine() -> None:
    gc.collect()
    before = threading.active_count()
    engine = LLMEngine(EngineConfig(model="demo", num_blocks=60, overlap=True))
    assert threading.active_count() == before
    engine.add_request("a", PROMPT, GREEDY)
    engine.step()
    assert threading.active_count() == before + 1
    model = weakref.ref(engine._built.cache)
    del engine  # with a step under way
    gc.collect()
    assert threading.active_count() == before and model() is None


def test_an_asynchronous_engine_that_overlaps_streams_the_same_and_ends_its_threads() -> None:
    async def main(overlap: bool) -> list[list[int]]:
        async with AsyncLLMEngine(EngineConfig(model="demo", dtype="float32", num_blocks=60, overlap=overlap)) as engine:

            async def read(seed: int) -> list[int]:
                params = SamplingParams(seed=seed, max_tokens=12, ignore_eos=True)
                outputs = [output async for output in engine.generate(PROMPT, params)]
                assert outputs[-1].finished
                return outputs[-1].outputs[0].token_ids

            found = await asyncio.gather(*map(read, range(3)))
            await engine.check()
            return found

    gc.collect()
    threads = threading.active_count()
    assert asyncio.run(main(True)) == asyncio.run(main(False))
    assert threading.active_count() == threads


ENDS = """
from pagefork import EngineConfig, LLMEngine, SamplingParams
engine = LLMEngine(EngineConfig(model="demo", num_blocks=60, overlap=True))
engine.add_request("a", "def f(", SamplingParams(max_tokens=50))
engine.step()
engine.step()
"""


def test_the_interpreter_ends_well_with_a_step_under_way() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", ENDS], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")

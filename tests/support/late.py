"""Runners around others: one that computes as late as can be, and one that fails."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

from pagefork.overlap import StepRunner
from pagefork.scheduler.plan import Plan, Result


class LateRunner:
    """Around another runner. Plans that name what the scheduler changes meanwhile are computed wrong.

    `out`: how many plans were out at every submit(), that one included.
    """

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._plans: deque[Plan] = deque()
        self.processors = runner.processors
        self.out: list[int] = []

    def submit(self, plan: Plan) -> None:
        self._plans.append(plan)
        self.out.append(len(self._plans))

    def collect(self) -> Result:
        self._runner.submit(self._plans.popleft())
        return self._runner.collect()

    def reset(self) -> None:
        while self._plans:  # as a device would: what stands in its queue is computed, whatever it finds
            with suppress(Exception):
                self.collect()
        self._runner.reset()


class Broken:
    """Around a runner: a submit() or a collect() raises where it is told to."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.processors = runner.processors
        self.reset = runner.reset
        self.breaks = ""
        self.error: BaseException = MemoryError("none left")

    def submit(self, plan: Plan) -> None:
        self._break("submit")
        self._runner.submit(plan)

    def collect(self) -> Result:
        self._break("collect")
        result: Result = self._runner.collect()
        return result

    def _break(self, where: str) -> None:
        if self.breaks == where:
            self.breaks = ""
            raise self.error

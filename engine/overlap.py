"""Overlap: the next step is planned while the one before it is computed."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import torch

from pagefork.scheduler.params import LogitsProcessor
from pagefork.scheduler.plan import Plan, Result, Runner

_END_SECONDS = 1.0  # how long whoever frees an engine waits for a step under way that nobody reads
_EXIT_SECONDS = 30.0  # how long the end of the interpreter does


class Processors(Protocol):
    """The logits processors of requests, by the numbers that plans know them under."""

    def register(self, number: int, prompt_len: int, processors: Sequence[LogitsProcessor]) -> None: ...

    def forget(self, number: int) -> None: ...


class StepRunner(Runner, Protocol):
    """What an engine needs of a runner."""

    @property
    def processors(self) -> Processors: ...

    def reset(self) -> None: ...


def overlaps(setting: bool | None, device: torch.device) -> bool:
    """Whether steps overlap; the setting may leave it open."""
    # On a CPU the thread that computes and the one that plans want Python's lock in turn. Measured on two cores, on / off:
    # 0.87 to 0.94 for the demo model, which leaves a core idle, with 1, 16 and 64 sequences; 1.02 to 1.04, which is less
    # than the runs differ by, for 134.5 M parameters.
    return device.type == "cuda" if setting is None else setting


def runner_for(runner: StepRunner, overlap: bool, device: torch.device) -> StepRunner:
    """A runner whose submit() returns at once, where steps overlap: a thread sees to it if the device does not."""
    return ThreadedRunner(runner) if overlap and device.type == "cpu" else runner


class ThreadedRunner:
    """Another runner, used in a thread of its own, where logits processors are called too.

    The thread starts with the first plan and ends with this object.
    """

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._worker = _Worker()
        self._results: SimpleQueue[Result | BaseException] = SimpleQueue()
        self._out = 0  # plans that were not collected
        self.processors: Processors = _ForgetLater(runner.processors, self._worker)

    def submit(self, plan: Plan) -> None:
        """Queue a plan; returns at once."""
        if not self._worker.runs:
            self._worker.start()
            weakref.finalize(self, self._worker.end).atexit = False
        self._out += 1
        # Torch keeps the number of its threads by thread.
        self._worker.put(partial(_compute, self._runner, plan, torch.get_num_threads(), self._results))

    def collect(self) -> Result:
        """The result of the oldest plan that was not collected yet. Waits for it; raises what computing it raised."""
        found = self._results.get()
        self._out -= 1
        if isinstance(found, BaseException):
            try:
                raise found
            finally:
                del found  # which its traceback leads to
        return found

    def reset(self) -> None:
        """Forget the plans that are out, once they are computed."""
        while self._out:
            self._results.get()
            self._out -= 1
        self._runner.reset()


class _ForgetLater:
    """Registers at once what plans to come may name; forgets behind the plans that are out."""

    def __init__(self, processors: Processors, worker: _Worker) -> None:
        self._processors, self._worker = processors, worker
        self.register = processors.register

    def forget(self, number: int) -> None:
        if number:  # 0: the request had none
            self._worker.put(partial(self._processors.forget, number))


class _Worker(threading.Thread):
    """Makes calls in the order in which they were put. It knows nobody, so that its user can be freed, which ends it."""

    def __init__(self) -> None:
        super().__init__(name="pagefork-runner", daemon=True)
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.put = self._calls.put

    @property
    def runs(self) -> bool:
        """Whether it was started."""
        return self.ident is not None

    def start(self) -> None:
        super().start()
        atexit.register(self._settle)

    def run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it holds a plan and a model

    def end(self) -> None:
        """Make the calls that were put, and end. Whoever calls this may hold a lock that they need, so it does not insist."""
        atexit.unregister(self._settle)
        self.put(None)
        if threading.current_thread() is not self:
            self.join(_END_SECONDS)

    def _settle(self) -> None:
        """Wait until nothing is computed: a thread that returns from C++ when the interpreter is gone would crash it."""
        settled = threading.Event()
        self.put(settled.set)
        settled.wait(_EXIT_SECONDS)


def _compute(runner: StepRunner, plan: Plan, threads: int, results: SimpleQueue[Result | BaseException]) -> None:
    """Compute a plan with so many of torch's threads, and put what came of it."""
    try:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        runner.submit(plan)
        results.put(runner.collect())
    except BaseException as error:  # noqa: BLE001 - it is raised where the result is collected
        results.put(error)

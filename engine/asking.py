"""Asks: numbers that a user's function computes in a thread of its own while the batch goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from pagefork.scheduler.endings import described
from pagefork.scheduler.errors import ValueFunctionError
from pagefork.scheduler.strategies.base import Ask


class Answer(NamedTuple):
    """What became of a request's Ask: its numbers, or the error that ends the request."""

    request_id: str
    found: list[float] | ValueFunctionError


class _Call:
    """One Ask under way; it is told from an earlier one of a request with the same id by its identity."""

    def __init__(self, request_id: str, ask: Ask) -> None:
        self.request_id = request_id
        self.ask = ask
        self.deadline = time.monotonic() + ask.timeout
        self.found: list[float] | ValueFunctionError

    def run(self, finished: SimpleQueue[_Call]) -> None:
        """Everything of the user's happens here: calling his function, and reading what it returned."""
        try:
            count = len(self.ask.items)
            self.found = _numbers(self.ask.function(self.ask.items), count)
        except _Refused as error:
            self.found = self.failed(f"returned {error}; it must return one finite number for each item that it is given")
        except BaseException as error:  # noqa: BLE001 - an exit or an interrupt of his ends his request and nothing else
            failure = self.found = self.failed(f"raised {described(error)}")
            failure.__cause__ = error
        finished.put(self)

    def failed(self, what: str) -> ValueFunctionError:
        return ValueFunctionError(f"the value function of request {self.request_id!r} {what}")


class Asking:
    """Runs Asks, one for a request at a time. All methods belong to the engine's thread.

    Each call has a daemon thread: one that hangs can't be ended, and must hold up neither the others nor the end of the
    interpreter. It keeps the Ask alive, and nothing of the engine. What comes from a call that nobody waits for is dropped.
    """

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}
        self._finished: SimpleQueue[_Call] = SimpleQueue()
        self._taken: list[_Call] = []

    def start(self, request_id: str, ask: Ask) -> None:
        """Call the Ask's function."""
        call = self._calls[request_id] = _Call(request_id, ask)
        try:
            Thread(target=call.run, args=(self._finished,), name="pagefork-ask", daemon=True).start()
        except RuntimeError as error:  # the system allows no more threads
            call.found = call.failed(f"could not be called: {error}")
            self._taken.append(call)

    def cancel(self, request_id: str) -> None:
        """Forget a request's Ask, if it has one."""
        self._calls.pop(request_id, None)

    def collect(self) -> list[Answer]:
        """Answers that have come, then errors for the Asks that are out for too long. Each is given once."""
        while not self._finished.empty():
            self._taken.append(self._finished.get())
        taken, self._taken = self._taken, []
        answers = [Answer(call.request_id, call.found) for call in taken if self._calls.get(call.request_id) is call]
        for answer in answers:
            del self._calls[answer.request_id]
        now = time.monotonic()
        for call in [call for call in self._calls.values() if call.deadline <= now]:
            del self._calls[call.request_id]
            late = f"gave no answer within {call.ask.timeout:g} seconds: make it faster, or raise value_timeout"
            answers.append(Answer(call.request_id, call.failed(late)))
        return answers

    def wait(self, seconds: float) -> None:
        """Until collect() has something, at most so long; not at all where nothing is out."""
        if not self._calls or self._taken:
            return
        nearest = min(call.deadline for call in self._calls.values()) - time.monotonic()
        with suppress(Empty):
            self._taken.append(self._finished.get(timeout=max(0.0, min(seconds, nearest))))


class _Refused(Exception):
    """What was returned, in words."""


def _numbers(returned: Any, count: int) -> list[float]:
    """One finite float for each item, from a list, an array or a tensor."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if isinstance(values, str | bytes | bytearray | Mapping | Set) or not isinstance(values, Iterable):
        raise _Refused(f"{type(returned).__name__} instead of a list")
    listed = list(islice(values, count + 1))
    if len(listed) != count:
        raise _Refused(f"{'more' if len(listed) > count else len(listed)} values for {count} items")
    return [_number(value, index) for index, value in enumerate(listed)]


def _number(value: Any, index: int) -> float:
    if isinstance(value, str | bytes | bytearray):
        raise _Refused(f"{type(value).__name__} at index {index}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise _Refused(f"{type(value).__name__} at index {index}") from None
    if not math.isfinite(number):
        raise _Refused(f"{number} at index {index}")
    return number

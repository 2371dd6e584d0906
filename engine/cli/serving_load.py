"""What `bench serve` sends, when it sends it, and what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pagefork.cli.load import Line, read_lines
from pagefork.scheduler.errors import InvalidRequestError, ServiceError


class Ask(NamedTuple):
    """One request: a text or token ids, and how many tokens are wanted."""

    prompt: str | list[int]
    output_len: int


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are seconds of time.perf_counter(), taken where the client reads.

    Tokens that come together are one arrival, as their reader sees them. `ended` is None while it runs.
    """

    sent: float
    ended: float | None = None
    arrivals: dict[int, list[float]] = field(default_factory=dict)  # by output
    prompt_tokens: int = 0
    tokens: int = 0  # of all outputs
    text: str = ""  # of the first output
    failure: ServiceError | None = None

    def arrived(self, output: int) -> None:
        """Tokens of an output have just come."""
        self.arrivals.setdefault(output, []).append(time.perf_counter())

    @property
    def good(self) -> bool:
        """Whether it ended as it should."""
        return self.ended is not None and self.failure is None

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token of any output."""
        return min(times[0] for times in self.arrivals.values()) - self.sent if self.arrivals else None

    @property
    def itl(self) -> list[float]:
        """Seconds from each arrival to the next of the same output."""
        return [after - before for times in self.arrivals.values() for before, after in pairwise(times)]

    @property
    def e2el(self) -> float:
        """Seconds from sending to the end."""
        return (self.ended or self.sent) - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where all tokens came at once, as those of a search may."""
        further = self.tokens / max(1, len(self.arrivals)) - 1
        if self.ttft is None or further <= 0 or not self.itl:
            return None
        return (self.e2el - self.ttft) / further


class Target(Protocol):
    """A running service, as a load sees it; what it does not tell is None."""

    model: str
    vocab_size: int | None
    max_model_len: int | None

    async def ask(self, ask: Ask, answer: Answer) -> None:
        """Send a request and read its answer to the end. Raises ServiceError."""


class Run(NamedTuple):
    """Answers in the order of sending; those of an interrupted run may lack an end. elapsed: seconds; peak: most at once."""

    answers: list[Answer]
    elapsed: float
    peak: int
    interrupted: bool


def random_asks(
    draw: np.random.Generator, count: int, vocab_size: int, lengths: tuple[int, int], prefix_len: int, ratio: float
) -> list[Ask]:
    """Prompts of random tokens behind one prefix that all share.

    lengths: of prompts, without the prefix, and of outputs; each is drawn evenly between length * (1 - ratio) and
    length * (1 + ratio).
    """
    prefix = draw.integers(vocab_size, size=prefix_len).tolist()
    inputs, outputs = (
        draw.integers(max(1, int(length * (1 - ratio))), int(length * (1 + ratio)), size=count, endpoint=True)
        for length in lengths
    )
    return [
        Ask(prefix + draw.integers(vocab_size, size=size).tolist(), int(wanted))
        for size, wanted in zip(inputs, outputs, strict=True)
    ]


def file_asks(file: Path, count: int | None, output_len: int) -> list[Ask]:
    """The first `count` lines of a file, None: all. Raises InvalidRequestError with the number of the line that is wrong."""

    def ask(line: Line) -> Ask:
        length = line.length(output_len)
        prompt = line.prompt if line.prompt_token_ids is None else line.prompt_token_ids
        if prompt is None:
            raise InvalidRequestError("messages are for the benchmarks in process; give prompt or prompt_token_ids")
        return Ask(prompt, length)

    return read_lines(file, count, ask)


def arrivals(draw: np.random.Generator, count: int, rate: float | None, burstiness: float) -> list[float]:
    """Seconds at which requests are sent: gaps of a gamma distribution of this shape, 1 for a Poisson process.

    They are stretched so that the last one is sent at count / rate: the rate is what was asked for, however few they are.
    rate: per second; None: all at once.
    """
    if rate is None:
        return [0.0] * count
    times = np.cumsum(draw.gamma(burstiness, size=count))
    return (times * (count / rate / times[-1])).tolist() if times[-1] else [0.0] * count


async def drive(
    target: Target, asks: Sequence[Ask], times: Sequence[float], limit: int | None, ended: Callable[[], object]
) -> Run:
    """Send each request at its time, at most `limit` at once; `ended` is called for each end.

    Cancelled, it abandons what runs and returns what there is.
    """
    room = nullcontext() if limit is None else asyncio.Semaphore(limit)
    answers: list[Answer] = []
    running = peak = 0

    async def one(ask: Ask) -> None:
        nonlocal running, peak
        async with room:
            answer = Answer(time.perf_counter())
            answers.append(answer)
            running += 1
            peak = max(peak, running)
            try:
                await target.ask(ask, answer)
            except ServiceError as error:
                answer.failure = error
            finally:
                running -= 1
            answer.ended = time.perf_counter()
            ended()

    interrupted = False
    tasks: list[asyncio.Task[None]] = []
    start = time.perf_counter()
    try:
        for ask, at in zip(asks, times, strict=True):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()) if at else 0)
            tasks.append(asyncio.create_task(one(ask)))
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        interrupted = True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Run(answers, time.perf_counter() - start, peak, interrupted)

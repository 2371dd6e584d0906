"""What a reader has of a request: deltas to give, and the output that they add up to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pagefork.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pagefork.scheduler.errors import ServiceError
from pagefork.wire import Accepted, Code, Delta, Final, Finished

from .request import Arrived, Event


@dataclass(slots=True)
class _Output:
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    final: Final | None = None

    def add(self, part: Delta | Final) -> None:
        self.tokens += part.tokens
        self.text.append(part.text)
        if part.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += part.logprobs

    def output(self, index: int, unfinished: str | None) -> CompletionOutput:
        """`unfinished`: the finish_reason where nothing was said of its end."""
        final = self.final
        self.text[:] = ["".join(self.text)]
        return CompletionOutput(
            index=index,
            text=self.text[0],
            token_ids=self.tokens.copy(),
            cumulative_logprob=0.0 if final is None else final.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs.copy(),
            finish_reason=unfinished if final is None else final.finish_reason,
            stop_reason=None if final is None else final.stop_reason,
            score=None if final is None else final.score,
        )


class Reading:
    """One request's events, taken in order by one reader.

    It gives credit as its deltas are given out: the engine may be `window` tokens ahead of the reader, in each output.
    """

    def __init__(self, rid: str, text: str | None, token_ids: list[int], window: int, credit: Callable[[int], None]) -> None:
        self.request_id = rid
        self.accepted: Accepted | None = None
        self.over = False
        self.aborting = False
        self.error: ServiceError | None = None
        self._text = text
        self._token_ids = token_ids
        self._window = window
        self._credit = credit
        self._granted = window
        self._read = 0
        self._pending: deque[Delta] = deque()
        self._outputs: dict[int, _Output] = {}
        self._finished: Finished | None = None
        self._begun = time.monotonic()

    def take(self, event: Event) -> None:
        """The next event."""
        if isinstance(event, Accepted):
            self.accepted = event
        elif isinstance(event, Delta):
            self._add(event)
        elif isinstance(event, Arrived):
            self._finish(event)
        else:
            self._fail(event)

    def next(self) -> Delta | None:
        """A delta to give out; None: there is none here."""
        if not self._pending:
            return None
        delta = self._pending.popleft()
        self._read = max(self._read, delta.start + len(delta.tokens))
        if not self.over and self._read + self._window - self._granted >= self._window / 2:
            self._granted = self._read + self._window
            self._credit(self._granted)
        return delta

    def output(self) -> RequestOutput:
        """Everything that has come."""
        finished = self._finished
        unfinished = None if finished is None else "abort"
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._text,
            prompt_token_ids=self._token_ids,
            prompt_logprobs=None if finished is None else finished.prompt_logprobs,
            outputs=[self._outputs[index].output(index, unfinished) for index in sorted(self._outputs)],
            finished=finished is not None or (self.over and self.error is None),
            metrics=self._metrics(finished),
            trace=None if finished is None else finished.trace,
        )

    def _add(self, delta: Delta) -> None:
        self._outputs.setdefault(delta.index, _Output()).add(delta)
        self._pending.append(delta)

    def _finish(self, event: Arrived) -> None:
        self.over, self._finished = True, event.finished
        if event.prompt_token_ids is not None:
            self._token_ids = event.prompt_token_ids
        for final in event.finished.outputs:
            output = self._outputs.setdefault(final.index, _Output())
            output.final = final
            output.add(final)
            if final.tokens or final.text:
                self._pending.append(_delta(self.request_id, final))
        failure = event.finished.error
        if failure is not None and not (self.aborting and failure.code == Code.CANCELLED):
            self.error = ServiceError(failure.code, failure.message)
            self.error.output = self.output()

    def _fail(self, error: ServiceError) -> None:
        self.over = True
        if not (self.aborting and error.code == Code.CANCELLED):
            self.error = error
            error.output = self.output() if self._outputs else None

    def _metrics(self, finished: Finished | None) -> RequestMetrics:
        if finished is None:
            return RequestMetrics(arrival_time=self._begun)
        usage, timings = finished.usage, finished.timings
        first = timings.first_token_ms
        return RequestMetrics(
            arrival_time=self._begun,
            first_token_time=None if first is None else self._begun + first / 1e3,
            finished_time=self._begun + timings.total_ms / 1e3,
            cached_tokens=usage.cached_tokens,
            preemptions=usage.preemptions,
            forward_tokens=usage.forward_tokens,
            forks=usage.forks,
            blocks_copied=usage.blocks_copied,
            blocks_freed=usage.blocks_freed,
            shared_block_ratio=usage.shared_block_ratio,
        )


def _delta(rid: str, final: Final) -> Delta:
    """What Finished brought of an output, as one more delta."""
    return Delta(
        rid=rid,
        index=final.index,
        start=final.start,
        tokens=final.tokens,
        text_from=final.text_from,
        text=final.text,
        logprobs=final.logprobs,
    )

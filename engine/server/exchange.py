"""One request of a client, from its Submit until nothing of it is kept, and the message that ends it."""

from __future__ import annotations

import msgspec

from pagefork import wire
from pagefork.outputs import Logprob, RequestOutput
from pagefork.scheduler.accounting import Trace
from pagefork.wire import Code, Failure

from .delivery import Delivery
from .session import Session


class Exchange:
    """A request; the engine's Ticket for it. Times are seconds of the service's clock.

    It is *queued* from add() to Queued, then *accepted*, then *ended* when the engine is through with it, and *kept* when
    its Finished was sent.
    """

    def __init__(
        self, request_id: str, session: Session, submit: wire.Submit, digest: bytes, arrived: float, reserved: int
    ) -> None:
        self.request_id = request_id
        self.rid = submit.rid
        self.session = session
        self.digest = digest  # of the frames that it came in
        self.delivery = Delivery(submit.stream, submit.credit)
        self.from_text = submit.text is not None
        self.arrived = arrived
        self.deadline = None if submit.deadline_ms is None else arrived + submit.deadline_ms / 1000
        self.reserved = reserved  # tokens; a text's bytes until its tokens are counted
        self.counted = not self.from_text
        self.accepted = False
        self.joined = False  # its client asked for it again
        self.ended: float | None = None
        self.cause: Failure | None = None  # why the service ends it
        self.caused = 0.0  # when
        self.failure: Failure | None = None  # what Finished says
        self.first_token: float | None = None
        self.last_token = 0.0
        self.blocked: float | None = None  # since when there is something to send that can't be sent
        self.kept_bytes = 0

    @property
    def at_once(self) -> bool:
        """Whether its end waits for no credit: it is the service's doing, and what can't be sent is cut off."""
        return self.cause is not None and self.failure is self.cause

    @property
    def may_finish(self) -> bool:
        """Whether its Finished is what comes next."""
        if self.ended is None:
            return False
        if self.delivery.paused:
            return self.at_once and self.cause is not None and self.cause.code != Code.DEADLINE
        return self.at_once or not self.delivery.behind

    @property
    def unsent(self) -> bool:
        """Whether its client has something to wait for that is there."""
        return self.ended is not None or self.delivery.behind

    def finished(self, max_trace_bytes: int) -> list[bytes]:
        """The frames of its Finished."""
        output = self.delivery.newest
        message = wire.Finished(
            rid=self.rid,
            outputs=self.delivery.finals(),
            usage=_usage(output, self.delivery.tokens),
            timings=wire.Timings(
                first_token_ms=None if self.first_token is None else (self.first_token - self.arrived) * 1000,
                total_ms=((self.ended or self.arrived) - self.arrived) * 1000,
            ),
            prompt_logprobs=output.prompt_logprobs if output else None,
            trace=_bounded(output.trace, max_trace_bytes) if output and output.trace else None,
            error=self.failure,
        )
        return wire.encode(message, wire.encode_tokens(output.prompt_token_ids) if output and self.from_text else None)

    def size(self) -> int:
        """About how many bytes of memory it takes."""
        output = self.delivery.newest
        if output is None:
            return _BASE_BYTES
        total = _BASE_BYTES + _ID_BYTES * len(output.prompt_token_ids) + _tables(output.prompt_logprobs)
        for one in output.outputs:
            total += _ID_BYTES * len(one.token_ids) + 2 * len(one.text) + _tables(one.logprobs)
        return total + (_STEP_BYTES * len(output.trace.steps) if output.trace else 0)


_BASE_BYTES = 2048
_ID_BYTES = 40  # a place in a list and an integer
_TABLE_BYTES = 232
_LOGPROB_BYTES = 160
_STEP_BYTES = 512


def _tables(logprobs: list[dict[int, Logprob]] | list[dict[int, Logprob] | None] | None) -> int:
    return sum(_TABLE_BYTES + _LOGPROB_BYTES * len(table) for table in logprobs or () if table)


def _usage(output: RequestOutput | None, completion_tokens: int) -> wire.Usage:
    if output is None:
        return wire.Usage()
    metrics = output.metrics
    return wire.Usage(
        prompt_tokens=len(output.prompt_token_ids),
        completion_tokens=completion_tokens,
        cached_tokens=metrics.cached_tokens,
        preemptions=metrics.preemptions,
        forward_tokens=metrics.forward_tokens,
        forks=metrics.forks,
        blocks_copied=metrics.blocks_copied,
        blocks_freed=metrics.blocks_freed,
        shared_block_ratio=metrics.shared_block_ratio,
    )


def _bounded(trace: Trace, most: int) -> Trace:
    """A trace of at most so many encoded bytes: its last steps are left out where it has more."""
    encoded = msgspec.msgpack.encode(trace)
    if len(encoded) <= most:
        return trace
    room = most - len(msgspec.msgpack.encode(Trace(trace.strategy, [], trace.usage, False))) - 4  # a longer array header
    steps = []
    for step in trace.steps:
        room -= len(msgspec.msgpack.encode(step))
        if room < 0:
            break
        steps.append(step)
    return Trace(trace.strategy, steps, trace.usage, False)

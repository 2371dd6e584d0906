"""What becomes of a request: the engine's events, and whoever ends it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pagefork import wire
from pagefork.engine_thread import Event, Queued
from pagefork.outputs import RequestOutput
from pagefork.wire import Code, Failure

from .courier import Courier
from .delivery import Delivery
from .exchange import Exchange
from .ledger import Ledger
from .metrics import Metrics
from .seam import Gate
from .session import Agenda, Session
from .submission import Refusal, code_of, message_of

logger = logging.getLogger("pagefork")

PATIENCE = 2.0  # seconds that the last output of a request which was told to end is waited for


class Lifecycle:
    """Leads each request to one end: an Error before it is accepted, else a Finished."""

    def __init__(
        self, gate: Gate, ledger: Ledger, metrics: Metrics, max_trace_bytes: int, clock: Callable[[], float], agenda: Agenda,
        log: Callable[..., None],
    ) -> None:  # fmt: skip
        self.courier = Courier(ledger, max_trace_bytes, self.fail)
        self._gate = gate
        self._ledger = ledger
        self._metrics = metrics
        self._clock = clock
        self._agenda = agenda
        self._log = log

    def event(self, exchange: Exchange, event: Event, now: float) -> None:
        """What the engine did."""
        try:
            if isinstance(event, RequestOutput):
                self._output(exchange, event, now)
            elif isinstance(event, Queued):
                self._accept(exchange, event.ahead)
            elif exchange.accepted:
                self._end(exchange, Failure(code=code_of(event), message=message_of(event)), now)
            else:
                self._withdraw(exchange, Refusal(code_of(event), message_of(event)))
        except Exception as error:  # noqa: BLE001 - it is this request's failure
            self.fail(exchange, error)

    def stop(self, exchange: Exchange, code: Code, message: str, now: float) -> None:
        """End a request for a reason of the service's. What the engine has of it is waited for."""
        failure = Failure(code=code, message=message)
        if not exchange.accepted:
            self.discard(exchange)
            self._withdraw(exchange, Refusal(code, message))
        elif exchange.ended is not None:
            if not exchange.at_once:
                self._overrule(exchange, failure)
        elif exchange.cause is None:
            exchange.cause, exchange.caused = failure, now
            self._agenda.by(now + PATIENCE)
            self._gate.abort(exchange)

    def impatient(self, exchange: Exchange, now: float) -> None:
        """The engine was told to end a request, and does not."""
        self.discard(exchange)
        self._end(exchange, exchange.cause, now)

    def lose(self, exchange: Exchange, code: Code, reason: str, now: float) -> None:
        """End a request at once, whatever the engine and the client do."""
        if not exchange.accepted:
            self.stop(exchange, code, reason, now)
            return
        failure = Failure(code=code, message=reason)
        if exchange.ended is None:
            self.discard(exchange)
            exchange.cause = exchange.cause or failure
            self._end(exchange, exchange.cause, now)
        elif exchange.delivery.paused or exchange.delivery.behind:
            self._overrule(exchange, failure)
        self.courier.conclude(exchange, now)

    def fail(self, exchange: Exchange, error: Exception) -> None:
        """Something is wrong in here: end the request, of whose outputs nothing can be relied on."""
        logger.error("request %s failed in the service", exchange.request_id, exc_info=error)
        if exchange.ended is None:
            self.discard(exchange)
        message = internal(error)
        if not exchange.accepted:
            self._withdraw(exchange, Refusal(Code.INTERNAL, message))
            return
        exchange.delivery = Delivery(exchange.delivery.stream, exchange.delivery.upto)
        failure = Failure(code=Code.INTERNAL, message=message)
        if exchange.ended is None:
            exchange.cause = failure
            self._end(exchange, failure, self._clock())
        else:
            self._overrule(exchange, failure)

    def refuse(self, session: Session, rid: str, refusal: Refusal) -> None:
        """Tell why there is no such request."""
        self._metrics.refused[refusal.code] += 1
        session.post(wire.Error(code=refusal.code, message=str(refusal), rid=rid, retry_after_ms=refusal.retry_after_ms))
        self._log("request.refused", session=session.name, client=session.client, rid=rid, code=str(refusal.code))

    def discard(self, exchange: Exchange) -> None:
        """Free what it holds in the engine."""
        try:
            self._gate.discard(exchange)
        except Exception:
            logger.exception("request %s can't be discarded", exchange.request_id)

    def _accept(self, exchange: Exchange, ahead: int) -> None:
        if exchange.accepted:
            return
        exchange.accepted = True
        self._metrics.accepted += 1
        session = exchange.session
        session.post(wire.Accepted(rid=exchange.rid, queue_position=ahead, attached=exchange.joined))
        self._log("request.accepted", session=session.name, client=session.client, rid=exchange.rid, ahead=ahead)

    def _output(self, exchange: Exchange, output: RequestOutput, now: float) -> None:
        self._accept(exchange, 0)
        if not exchange.counted:
            self._ledger.count(exchange, len(output.prompt_token_ids))
        grown = exchange.delivery.put(output)
        if grown:
            self._time(exchange, grown, now)
        exchange.session.dirty[exchange] = None
        if output.finished:
            self._end(exchange, _failure(exchange, output), now)

    def _time(self, exchange: Exchange, grown: int, now: float) -> None:
        if exchange.first_token is None:
            exchange.first_token = now
            self._metrics.first_token.observe(now - exchange.arrived)
        else:
            self._metrics.between_tokens.observe((now - exchange.last_token) / grown, grown)
        exchange.last_token = now

    def _end(self, exchange: Exchange, failure: Failure | None, now: float) -> None:
        """The engine is through with it."""
        exchange.ended, exchange.failure = now, failure
        self._ledger.release(exchange, now)
        self._metrics.end_to_end.observe(now - exchange.arrived)
        newest = exchange.delivery.newest
        outputs = newest.outputs if newest is not None else []
        for output in outputs:
            self._metrics.finished[output.finish_reason or "abort"] += 1
        if failure is not None:
            self._metrics.failed[failure.code] += 1
        session = exchange.session
        session.dirty[exchange] = None
        self._log(
            "request.finished",
            session=session.name,
            client=session.client,
            rid=exchange.rid,
            tokens=sum(len(output.token_ids) for output in outputs),
            ms=round((now - exchange.arrived) * 1000),
            code=str(failure.code) if failure is not None else None,
        )

    def _overrule(self, exchange: Exchange, failure: Failure) -> None:
        """It has ended, but its client can't be told all of that; why it failed by itself comes first."""
        if exchange.failure is None:
            exchange.failure = failure
            self._metrics.failed[failure.code] += 1
        exchange.cause = exchange.failure
        session = exchange.session
        session.dirty[exchange] = None
        self._log("request.cut", session=session.name, client=session.client, rid=exchange.rid, code=str(exchange.failure.code))

    def _withdraw(self, exchange: Exchange, refusal: Refusal) -> None:
        """It was not accepted, and leaves no trace."""
        self._ledger.drop(exchange)
        self.refuse(exchange.session, exchange.rid, refusal)


def internal(error: Exception) -> str:
    """What a client is told of a bug."""
    return f"{type(error).__name__} in the service; its log says more"


def _failure(exchange: Exchange, output: RequestOutput) -> Failure | None:
    """Why an output is no proper one. A request that the service told to end may have ended before."""
    if output.error is not None:
        return Failure(code=code_of(output.error), message=message_of(output.error))
    if all(one.finish_reason not in (None, "abort") for one in output.outputs):
        return None
    return exchange.cause or Failure(code=Code.ENGINE_LOST, message="the engine stopped")

"""The requests of all sessions: what their clients ask for, and what is due."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence

from pagefork import wire
from pagefork.engine_thread import Event
from pagefork.limits import Limits
from pagefork.wire import Code, Have

from . import submission
from .exchange import Exchange
from .ledger import Ledger
from .lifecycle import PATIENCE, Lifecycle, internal
from .metrics import Metrics
from .seam import Facts, Gate, Timing
from .session import Agenda, Session
from .submission import Refusal

logger = logging.getLogger("pagefork")


class Requests:
    """The requests of all sessions. `draining`: no more are accepted."""

    def __init__(
        self, gate: Gate, facts: Facts, limits: Limits, timing: Timing, clock: Callable[[], float], agenda: Agenda,
        log: Callable[..., None],
    ) -> None:  # fmt: skip
        self.draining = False
        self.ledger = Ledger(limits, timing.keep)
        self.metrics = Metrics()
        self._life = Lifecycle(gate, self.ledger, self.metrics, limits.max_trace_bytes, clock, agenda, log)
        self.courier = self._life.courier
        self._gate = gate
        self._facts = facts
        self._limits = limits
        self._stall = timing.stall
        self._agenda = agenda
        self._number = 0

    def submit(self, session: Session, submit: wire.Submit, blob: bytes | None, frames: Sequence[bytes], now: float) -> None:
        """A new request, or one that is known, asked for again."""
        digest = _digest(frames)
        known = session.exchanges.get(submit.rid)
        try:
            if known is None:
                self._open(session, submit, blob, digest, now)
            elif known.digest == digest:
                self._join(known, [], max(submit.credit, known.delivery.upto), now)
            else:
                raise Refusal(Code.DUPLICATE_MISMATCH, f"rid {submit.rid!r} is the id of another request of this session")
        except Refusal as refusal:
            self._life.refuse(session, submit.rid, refusal)

    def attach(self, session: Session, attach: wire.Attach, now: float) -> None:
        """Go on with a request after what its client has."""
        try:
            exchange = session.exchanges.get(attach.rid)
            if exchange is None:
                raise Refusal(Code.INVALID_ARGUMENT, f"there is no request {attach.rid!r} in this session")
            self._join(exchange, attach.have, attach.credit, now)
        except Refusal as refusal:
            self._life.refuse(session, attach.rid, refusal)

    def credit(self, session: Session, credit: wire.Credit) -> None:
        """More may be sent; unknown requests have ended."""
        exchange = self._active(session, credit.rid)
        if exchange is not None and credit.upto > exchange.delivery.upto:
            exchange.delivery.upto = credit.upto
            session.dirty[exchange] = None

    def abort(self, session: Session, abort: wire.Abort, now: float) -> None:
        """Its client wants nothing more of it; unknown requests have ended."""
        exchange = self._active(session, abort.rid)
        if exchange is not None:
            self._life.stop(exchange, Code.CANCELLED, "aborted by its client", now)

    def event(self, exchange: Exchange, event: Event, now: float) -> bool:
        """What the engine did; whether it matters to anyone."""
        matters = exchange in self.ledger.active and exchange.ended is None
        if matters:
            self._life.event(exchange, event, now)
        return matters

    def forget(self, session: Session) -> int:
        """Its client is gone: end its requests, of which nobody wants to hear; how many were under way."""
        count = 0
        for exchange in list(session.exchanges.values()):
            if exchange in self.ledger.active and exchange.ended is None:
                count += 1
                self._life.discard(exchange)
            self.ledger.drop(exchange)
        return count

    def lose(self, reason: str, now: float) -> None:
        """The engine is gone: end all."""
        for exchange in list(self.ledger.active):
            self._life.lose(exchange, Code.ENGINE_LOST, reason, now)

    def blame(self, session: Session, rid: str | None, error: Exception) -> None:
        """A message failed; end the request that it was about."""
        exchange = self._active(session, rid) if rid is not None else None
        if exchange is not None:
            self._life.fail(exchange, error)
            return
        logger.error("a message failed in the service", exc_info=error)
        session.post(wire.Error(code=Code.INTERNAL, message=internal(error), rid=rid))

    def look(self, now: float, drain_until: float | None) -> None:
        """Do what is due."""
        self._agenda.by(self.ledger.expire(now))
        for exchange in list(self.ledger.active):
            try:
                if drain_until is not None and now >= drain_until:
                    self._drain(exchange, now, last=now >= drain_until + PATIENCE)
                self._watch_engine(exchange, now)
                self._watch_client(exchange, now)
            except Exception as error:  # noqa: BLE001 - it is this request's failure
                self._life.fail(exchange, error)

    def _active(self, session: Session, rid: str) -> Exchange | None:
        exchange = session.exchanges.get(rid)
        return exchange if exchange is not None and exchange in self.ledger.active else None

    def _open(self, session: Session, submit: wire.Submit, blob: bytes | None, digest: bytes, now: float) -> None:
        if self.draining:
            raise Refusal(Code.DRAINING, "the engine is about to stop")
        reserve = submission.weight(submit, blob)
        self.ledger.check_room(reserve, now)
        prompt, params = submission.check(submit, blob, self._limits, self._facts)
        self._number += 1
        exchange = Exchange(str(self._number), session, submit, digest, now, reserve)
        self.ledger.open(exchange)
        if exchange.deadline is not None:
            self._agenda.by(exchange.deadline)
        try:
            self._gate.add(
                exchange,
                prompt,
                params,
                priority=submit.priority,
                salt=session.principal,
                max_forward_tokens=self._limits.max_forward_tokens,
            )
        except Exception as error:  # noqa: BLE001 - it is this request's failure
            self._life.fail(exchange, error)

    def _join(self, exchange: Exchange, have: Sequence[Have], credit: int, now: float) -> None:
        """Send what a client does not have, of a request under way or kept."""
        try:
            exchange.delivery.restart(have, credit)
        except ValueError as error:
            raise Refusal(Code.INVALID_ARGUMENT, str(error)) from None
        self.ledger.revive(exchange, now)
        exchange.joined = True
        if exchange.accepted:
            exchange.session.post(wire.Accepted(rid=exchange.rid, attached=True))
        exchange.session.dirty[exchange] = None

    def _drain(self, exchange: Exchange, now: float, last: bool) -> None:
        reason = "the engine stops"
        if last:
            self._life.lose(exchange, Code.DRAINING, reason, now)
        else:
            self._life.stop(exchange, Code.DRAINING, reason, now)

    def _watch_engine(self, exchange: Exchange, now: float) -> None:
        """Its deadline, and the patience with an engine that was told to end it."""
        if exchange.ended is not None or exchange not in self.ledger.active:
            return
        if exchange.cause is not None:
            if now >= exchange.caused + PATIENCE:
                self._life.impatient(exchange, now)
            else:
                self._agenda.by(exchange.caused + PATIENCE)
        elif exchange.deadline is not None:
            if now >= exchange.deadline:
                self._life.stop(exchange, Code.DEADLINE, "deadline_ms passed", now)
            else:
                self._agenda.by(exchange.deadline)

    def _watch_client(self, exchange: Exchange, now: float) -> None:
        """Whether its client takes what there is."""
        if exchange.blocked is None or exchange not in self.ledger.active:
            return
        if now < exchange.blocked + self._stall:
            self._agenda.by(exchange.blocked + self._stall)
        elif exchange.at_once:
            self.courier.conclude(exchange, now)
        else:
            message = f"there was output, and for {self._stall:g} s it could not be sent: no credit, or nobody reads"
            self._life.stop(exchange, Code.CLIENT_STALLED, message, now)


def _digest(frames: Sequence[bytes]) -> bytes:
    digest = hashlib.blake2b(len(frames[1]).to_bytes(8, "little"), digest_size=16)
    for frame in frames[1:]:
        digest.update(frame)
    return digest.digest()

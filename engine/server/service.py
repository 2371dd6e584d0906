"""The service's rules: what comes of every message, event and moment. No sockets, no threads, no clock of its own.

docs/protocol.md says what clients are promised. One thread calls these methods; none of them blocks or raises.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence

from pagefork import wire
from pagefork.engine_thread import Event
from pagefork.limits import Limits
from pagefork.outputs import EngineStats
from pagefork.wire import Code

from .exchange import Exchange
from .requests import Requests
from .seam import Facts, Gate, Send, Ticket, Timing
from .session import Agenda, Session
from .sessions import Log, Sessions

logger = logging.getLogger("pagefork")

_LEAST_WAIT = 0.01  # seconds between two looks at what is due
_MOST_WAIT = 5.0
_STATS_ASKED = 64  # by one session, not answered yet
_STATS_PATIENCE = 10.0  # seconds until an engine that gave no numbers is asked again


class Service:
    """Sessions of clients, and their requests, in front of an engine.

    Messages come by receive(), the engine's events by deliver(), and tick() wants to be called after each of them and when
    it says. `token`: what a connection without a principal of its own has to show. `boot_id`: of this service.
    """

    def __init__(
        self,
        gate: Gate,
        send: Send,
        facts: Facts,
        limits: Limits,
        timing: Timing | None = None,
        *,
        token: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        urandom: Callable[[int], bytes] = os.urandom,
        log: Log = lambda event, /, **fields: None,
    ) -> None:
        timing = timing or Timing()
        self._gate = gate
        self._clock = clock
        self._log = log
        self._agenda = Agenda(clock())
        self._requests = Requests(gate, facts, limits, timing, clock, self._agenda, log)
        self._sessions = Sessions(send, facts, limits, timing, token, urandom, self._requests, self._agenda, log)
        self._drain_until: float | None = None
        self._ask_again = float("-inf")  # when the engine may be asked for its numbers
        self.boot_id = self._sessions.boot_id

    @property
    def drained(self) -> bool:
        """Whether drain() or close() has ended all there was."""
        return self._sessions.over is not None

    def receive(self, peer: bytes, frames: Sequence[bytes], principal: str | None) -> None:
        """A message. principal: who the connection belongs to; None: who shows the token."""
        try:
            self._receive(peer, frames, principal, self._clock())
        except Exception:
            logger.exception("a message failed in the service")

    def deliver(self, events: Mapping[Ticket, Event]) -> None:
        """What the engine did since the last call: the newest event of each request that has any."""
        now = self._clock()
        touched: dict[Session, None] = {}
        for ticket, event in events.items():
            try:
                if isinstance(ticket, Exchange) and self._requests.event(ticket, event, now):
                    touched[ticket.session] = None
            except Exception:
                logger.exception("an event of request %s failed in the service", ticket.request_id)
        for session in touched:
            self._sessions.flush(session, now)

    def tick(self) -> float:
        """Do what is due; in how many seconds something else may be."""
        now = self._clock()
        drained = self._drain_until is not None and not self._requests.ledger.active and not self.drained
        if now >= self._agenda.due or drained:
            try:
                self._look(now)
            except Exception:
                logger.exception("the service failed to do what was due")
                self._agenda.due = now + _MOST_WAIT
        return min(max(self._agenda.due - now, 0.0), _MOST_WAIT)

    def drain(self, seconds: float) -> None:
        """Accept nothing more, let requests go on for so long, then end them. The shortest of several calls counts."""
        now = self._clock()
        until = now + max(seconds, 0.0)
        self._drain_until = until if self._drain_until is None else min(until, self._drain_until)
        self._requests.draining = True
        self._agenda.by(now)
        self._log("service.drain", seconds=seconds, requests=len(self._requests.ledger.active))

    def close(self, reason: str) -> None:
        """The engine is lost: end all requests and sessions now."""
        now = self._clock()
        for session in self._sessions:
            self._sessions.flush(session, now)
        self._requests.lose(reason, now)
        self._requests.draining = True
        self._sessions.say_goodbye(reason)

    def _receive(self, peer: bytes, frames: Sequence[bytes], principal: str | None, now: float) -> None:
        if self._sessions.is_closed(peer):
            return
        try:
            message, blob = wire.decode_from_client(frames)
            if blob is not None and not isinstance(message, wire.Submit):
                raise wire.WireError(f"{type(message).__name__} has no blob")
        except wire.WireError as error:
            self._requests.metrics.malformed += 1
            self._sessions.malformed(peer, error)
            return
        if isinstance(message, wire.Hello):
            self._sessions.hello(peer, message, principal, now)
            return
        session = self._sessions.of(peer, principal)
        if session is None:
            self._sessions.tell(peer, Code.UNAUTHENTICATED, "say Hello first")
            return
        session.heard, session.detached = now, None
        try:
            self._obey(session, message, blob, frames, now)
        except Exception as error:  # noqa: BLE001 - it is this message's failure
            rid = message.rid if isinstance(message, wire.Submit | wire.Credit | wire.Abort | wire.Attach) else None
            self._requests.blame(session, rid, error)
        self._sessions.flush(session, now)

    def _obey(
        self, session: Session, message: wire.ClientMessage, blob: bytes | None, frames: Sequence[bytes], now: float
    ) -> None:
        match message:
            case wire.Submit():
                self._requests.submit(session, message, blob, frames, now)
            case wire.Credit():
                self._requests.credit(session, message)
            case wire.Abort():
                self._requests.abort(session, message, now)
            case wire.Attach():
                self._requests.attach(session, message, now)
            case wire.Ping():
                self._pong(session, message)
            case wire.Stats():
                self._ask_stats(session)
            case wire.Bye():
                self._sessions.end(session, None, "bye")

    def _pong(self, session: Session, ping: wire.Ping) -> None:
        moment = self._gate.moment
        session.post(
            wire.Pong(
                t=ping.t,
                boot_id=self.boot_id,
                state="running" if self._drain_until is None else "draining",
                last_step_age_ms=round(self._step_age() * 1000),
                running=moment.running,
                waiting=moment.waiting,
                free_blocks=moment.free_blocks,
            )
        )

    def _step_age(self) -> float:
        moment = self._gate.moment
        return max(0.0, self._clock() - moment.at) if moment.busy else 0.0

    def _ask_stats(self, session: Session) -> None:
        """The engine is asked once for all who wait."""
        session.stats_asked = min(session.stats_asked + 1, _STATS_ASKED)
        now = self._clock()
        if now >= self._ask_again:
            self._ask_again = now + _STATS_PATIENCE
            self._gate.stats(self._reply_stats)

    def _reply_stats(self, stats: EngineStats) -> None:
        self._ask_again = float("-inf")
        try:
            self._answer_stats(stats)
        except Exception:
            logger.exception("stats can't be sent")

    def _answer_stats(self, stats: EngineStats) -> None:
        ledger, metrics = self._requests.ledger, self._requests.metrics
        report = metrics.report(len(self._sessions), len(ledger.active), ledger.reserved, self._step_age())
        reply = wire.StatsReply(engine=stats, service=report)
        for session in self._sessions:
            if session.stats_asked:
                for _ in range(session.stats_asked):
                    session.post(reply)
                session.stats_asked = 0
                self._sessions.flush(session, self._clock())

    def _look(self, now: float) -> None:
        """Do what is due in all sessions and requests, and find when to look again."""
        self._agenda.due = float("inf")
        for session in self._sessions:
            self._sessions.watch(session, now)
        self._requests.look(now, self._drain_until)
        for session in self._sessions:
            self._sessions.flush(session, now)
        if self._drain_until is not None and not self.drained:
            if self._requests.ledger.active:
                self._agenda.by(self._drain_until)
            else:
                self._sessions.say_goodbye("the engine stops")
        self._agenda.due = max(self._agenda.due, now + _LEAST_WAIT)

"""A client of the service without its input and output: messages in, messages and events out, and what the clock asks for.

    state.submit(...), state.ask(...)       what a user wants
    state.tick()                            do what is due; then `connection` says whether one is wanted, and which
    state.opened(), .receive(), .broken()   what became of it
    state.take_messages(), .take_events()   what is to be sent and delivered

One thread owns it. Everything is bounded by what its user asks for and by the credit that its readers give.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from pagefork.scheduler.errors import ServiceError
from pagefork.wire import (
    Abort,
    Accepted,
    Bye,
    ClientMessage,
    Code,
    Credit,
    Delta,
    Deltas,
    EngineMessage,
    Error,
    Final,
    Finished,
    GoAway,
    Ping,
    Pong,
    Stats,
    StatsReply,
    Welcome,
    WireError,
    decode_from_engine,
    decode_tokens,
)

from .link import Link, Lost, Phase
from .request import Arrived, Event, Request, Sink, Status

logger = logging.getLogger("pagefork")

_NOTHING_DONE = (Code.QUEUE_FULL, Code.DRAINING, Code.ENGINE_LOST)  # unless tokens came before


class Ask:
    """A question that one message answers: Stats, Ping, or None for the Welcome."""

    def __init__(self, kind: type[Stats | Ping] | None, future: Future[Any]) -> None:
        self.kind = kind
        self.future = future
        self.sent: ClientMessage | None = None
        self.give_up_at = math.inf

    def answer(self, value: Any) -> None:
        """Tell the one who asked, unless he has left."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(value, ServiceError):
            self.future.set_exception(value)
        else:
            self.future.set_result(value)


class ClientState(Link):
    """Requests and questions over a Link. Seconds throughout, of `clock`."""

    def __init__(
        self,
        *,
        name: str = "",
        session: bytes | None = None,
        connect_timeout: float = 10.0,
        reconnect_timeout: float = 1.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, session, reconnect_timeout, clock)
        self._connect_timeout = connect_timeout
        self._requests: dict[str, Request] = {}
        self._asks: list[Ask] = []
        self._aborts: set[str] = set()  # of requests whose reader left while there was no connection
        self._events: list[tuple[Sink, Event]] = []

    @property
    def wanted(self) -> bool:
        return bool(self._requests or self._asks)

    def submit(self, rid: str, frames: list[bytes], sink: Sink, credit: int, deadline: float | None = None) -> None:
        """Send a request; `frames` is its Submit, or nothing to attach to one of this session. Events go to `sink`.

        deadline: seconds that it may wait for a connection, if that is less than it would anyway.
        """
        if rid in self._requests:
            error = ServiceError(Code.DUPLICATE_MISMATCH, f"this client has a request {rid!r} under way")
            self._events.append((sink, error))
            return
        now = self._clock()
        by = math.inf if deadline is None else now + deadline
        request = self._requests[rid] = Request(rid, frames, sink, credit, min(now + self._connect_timeout, by), by)
        self.want()
        if self.phase is Phase.UP:
            self._forward(request)

    def ask(self, ask: Ask) -> None:
        """Ask the engine something."""
        ask.give_up_at = self._clock() + self._connect_timeout
        self._asks.append(ask)
        self.want()
        if self.phase is Phase.UP:
            self._forward_ask(ask)

    def credit(self, rid: str, upto: int, sink: Sink | None = None) -> None:
        """The reader has room for tokens before the offset `upto`. `sink` tells its request from later ones of that rid."""
        request = self._find(rid, sink)
        if request is not None and upto > request.credit:
            request.credit = upto
            if self.phase is Phase.UP:
                self.send(Credit(rid=rid, upto=upto))

    def abort(self, rid: str, sink: Sink | None = None) -> None:
        """End a request; its terminal comes."""
        request = self._find(rid, sink)
        if request is None or request.aborted:
            return
        request.aborted = True
        if request.status is Status.UNSENT:
            self._end(request, ServiceError(Code.CANCELLED, "aborted before it was sent", retry_safe=True))
        elif self.phase is Phase.UP:
            self.send(Abort(rid=rid))

    def leave(self, rid: str, sink: Sink | None = None) -> None:
        """End a request of which nobody wants to hear any more."""
        request = self._find(rid, sink)
        if request is None:
            return
        del self._requests[rid]
        if request.status is Status.UNSENT:
            return
        if self.phase is Phase.UP:
            self.send(Abort(rid=rid))
        else:
            self._aborts.add(rid)

    def close(self, reason: str = "the client was closed", *, keep_session: bool = False) -> None:
        """End everything. The messages that are left, Bye unless the session is kept, can still be taken."""
        if self.phase is Phase.UP and not keep_session:
            self.send(Bye())
        self.shut(Lost(reason, Code.CANCELLED))

    def receive(self, frames: Sequence[bytes]) -> None:
        """A message of the engine."""
        if self.phase not in (Phase.OPENING, Phase.UP):
            return
        try:
            message, blob = decode_from_engine(frames)
            prompt = None if blob is None else decode_tokens(blob)
        except WireError as error:
            logger.error("a message of the engine can't be read: %s", error)
            self.abandon(Lost(f"a message of the engine can't be read: {error}", Code.INTERNAL))
            return
        self.heard()
        match message:
            case Welcome():
                if self.phase is Phase.OPENING:
                    self.welcomed(message)
                    self._go_on()
            case GoAway():
                self.sent_away(message)
            case Error():
                self._refused(message)
            case _ if self.phase is Phase.UP:
                self._hear(message, prompt)

    def tick(self) -> float:
        """Do what is due; seconds until something will be."""
        now = self._clock()
        return max(0.0, min(self.keep(now), self._give_up(now)) - now)

    def take_events(self) -> list[tuple[Sink, Event]]:
        """What is to be delivered, in order."""
        events, self._events = self._events, []
        return events

    def lose(self, lost: Lost) -> None:
        """End what was sent."""
        self._aborts.clear()
        for request in [request for request in self._requests.values() if request.status is not Status.UNSENT]:
            self._end(request, _error(lost, request))
        for ask in [ask for ask in self._asks if ask.sent is not None]:
            self._answer(ask, _error(lost))

    def refuse(self, lost: Lost) -> None:
        """End what was not sent."""
        self._end_unsent(lost, math.inf)

    def _find(self, rid: str, sink: Sink | None) -> Request | None:
        request = self._requests.get(rid)
        return request if request is not None and (sink is None or sink is request.sink) else None

    def _hear(self, message: EngineMessage, prompt: list[int] | None) -> None:
        match message:
            case Deltas():
                for delta in message.deltas:
                    if (request := self._requests.get(delta.rid)) is not None and self._follows(request, [delta]):
                        self._events.append((request.sink, delta))
            case Accepted():
                self._accepted(message)
            case Finished():
                if (request := self._requests.get(message.rid)) is not None and self._follows(request, message.outputs):
                    self._end(request, Arrived(message, prompt))
            case Pong():
                self._ponged(message)
            case StatsReply():
                self._answer(next((ask for ask in self._asks if ask.kind is Stats), None), message)

    def _go_on(self) -> None:
        """Say what has to be said over a new connection."""
        for rid in self._aborts:
            self.send(Abort(rid=rid))
        self._aborts.clear()
        for request in self._requests.values():
            self._forward(request)
        for ask in list(self._asks):
            self._forward_ask(ask)

    def _forward(self, request: Request) -> None:
        """Send a request for the first time or again: the engine knows it by its rid and its bytes."""
        if request.frames and request.status is not Status.ACCEPTED:
            self._messages.append(request.frames)
        else:
            self.send(request.attach())
        if request.status is Status.UNSENT:
            request.status = Status.SENT
        if request.aborted:
            self.send(Abort(rid=request.rid))

    def _forward_ask(self, ask: Ask) -> None:
        if ask.kind is None:
            self._answer(ask, self.welcome)
            return
        ask.sent = Ping(t=next(self._numbers)) if ask.kind is Ping else Stats()
        self.send(ask.sent)

    def _refused(self, message: Error) -> None:
        if message.rid is not None:
            if (request := self._requests.get(message.rid)) is not None:
                self._end(request, _error(Lost(message.message, message.code, message.retry_after_ms), request))
        elif self.phase is Phase.OPENING or message.code == Code.UNAUTHENTICATED:
            self.broken(message.message, next((code for code in Code if code == message.code), None))
        else:
            logger.warning("the engine refused a message: %s: %s", message.code, message.message)

    def _accepted(self, message: Accepted) -> None:
        request = self._requests.get(message.rid)
        if request is not None and request.status is Status.SENT:
            request.status = Status.ACCEPTED
            self._events.append((request.sink, message))

    def _follows(self, request: Request, parts: Sequence[Delta | Final]) -> bool:
        """Whether these go on where the last ones ended; else the request is over."""
        for part in parts:
            if (wrong := request.advance(part)) is not None:
                logger.error("request %s: %s", request.rid, wrong)
                self.send(Abort(rid=request.rid))
                self._end(request, ServiceError(Code.INTERNAL, wrong))
                return False
        return True

    def _ponged(self, message: Pong) -> None:
        assert self.welcome is not None
        if message.boot_id != self.welcome.boot_id:
            self.abandon(Lost("another engine has taken its place"))
            return
        self._answer(next((ask for ask in self._asks if isinstance(ask.sent, Ping) and ask.sent.t == message.t), None), message)

    def _answer(self, ask: Ask | None, value: Any) -> None:
        if ask is not None:
            self._asks.remove(ask)
            ask.answer(value)

    def _end(self, request: Request, event: Arrived | ServiceError) -> None:
        del self._requests[request.rid]
        self._events.append((request.sink, event))

    def _end_unsent(self, lost: Lost, now: float) -> None:
        """End what would wait no longer than until `now`."""
        for request in [request for request in self._requests.values() if request.status is Status.UNSENT]:
            if now >= request.give_up_at:
                late = Lost("the deadline passed before there was a connection", Code.DEADLINE)
                self._end(request, _error(late if request.deadline <= now < math.inf else lost, request))
        for ask in [ask for ask in self._asks if ask.sent is None and now >= ask.give_up_at]:
            self._answer(ask, _error(lost))

    def _give_up(self, now: float) -> float:
        """End what has waited too long for a connection; when the next one will have."""
        if self.phase is Phase.UP:
            return math.inf
        reason = f"no connection to the engine within {self._connect_timeout:g} s: {self._trouble.reason}"
        self._end_unsent(self._trouble._replace(reason=reason), now)
        requests = (request.give_up_at for request in self._requests.values() if request.status is Status.UNSENT)
        asks = (ask.give_up_at for ask in self._asks if ask.sent is None)
        return min(itertools.chain(requests, asks), default=math.inf)


def _error(lost: Lost, request: Request | None = None) -> ServiceError:
    untouched = request is None or not request.has_tokens
    return ServiceError(lost.code, lost.reason, lost.retry_after_ms, lost.code in _NOTHING_DONE and untouched)

"""Who is there: peers say Hello, are welcomed, sent away, or found to be gone."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from pagefork import wire
from pagefork.limits import Limits
from pagefork.wire import Code

from .requests import Requests
from .seam import Facts, Send, Sent, Timing
from .session import RETRY, Agenda, Line, Peers, Session, key_of

logger = logging.getLogger("pagefork")

TOKEN_PRINCIPAL = "token"  # whoever shows the token


class Log(Protocol):
    """Where events go, with their fields; it makes values safe to read."""

    def __call__(self, event: str, /, **fields: object) -> None: ...


class Sessions:
    """The sessions, the peers that speak for them, and those that speak for nobody.

    A session ends when its client says Bye or Hello anew, sends too many bad frames, or is not heard of. While it lasts its
    secret leads back to it from any peer of the same principal; to others it does not exist.
    """

    def __init__(
        self,
        send: Send,
        facts: Facts,
        limits: Limits,
        timing: Timing,
        token: str | None,
        urandom: Callable[[int], bytes],
        requests: Requests,
        agenda: Agenda,
        log: Log,
    ) -> None:
        self.boot_id = urandom(8).hex()
        self.over: wire.GoAway | None = None
        self._send_raw = send
        self._facts = facts
        self._limits = limits
        self._timing = timing
        self._token = token
        self._urandom = urandom
        self._requests = requests
        self._agenda = agenda
        self._log = log
        self._peers = Peers()
        self._sessions: dict[bytes, Session] = {}  # by key

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def is_closed(self, peer: bytes) -> bool:
        """Whether nothing of a peer is read any more."""
        return self._peers.is_closed(peer)

    def of(self, peer: bytes, principal: str | None) -> Session | None:
        """Whom a peer speaks for."""
        session = self._peers.session(peer)
        return session if session is not None and session.principal == (principal or TOKEN_PRINCIPAL) else None

    def tell(self, peer: bytes, code: Code, message: str, retry_after_ms: int | None = None) -> None:
        """An Error for who has no session; lost, where it isn't read."""
        self._send(peer, wire.encode(wire.Error(code=code, message=message, retry_after_ms=retry_after_ms)))

    def hello(self, peer: bytes, hello: wire.Hello, principal: str | None, now: float) -> None:
        """Welcome a peer, or say why not."""
        if self.over is not None:
            self._send(peer, wire.encode(self.over))
        elif not hello.proto_min <= wire.VERSION <= hello.proto_max:
            spoken = f"{hello.proto_min} to {hello.proto_max}"
            self.tell(peer, Code.VERSION, f"this engine speaks version {wire.VERSION} of the protocol, the client {spoken}")
        elif principal is None and not self._shows_token(hello):
            self.tell(peer, Code.UNAUTHENTICATED, "Hello shows no token, or a wrong one")
            if self._peers.strike(peer):
                self._close(peer)
        else:
            self._welcome(peer, hello, principal or TOKEN_PRINCIPAL, now)

    def malformed(self, peer: bytes, error: wire.WireError) -> None:
        """A peer sent what is no message."""
        session = self._peers.session(peer)
        if session is None or session.line is None:
            self.tell(peer, error.code, str(error))
        else:
            session.line.post(wire.Error(code=error.code, message=str(error), rid=error.rid))
        if self._peers.strike(peer):
            self._close(peer)

    def flush(self, session: Session, now: float) -> None:
        """Send what may be sent, and see whether somebody is there."""
        try:
            self._requests.courier.flush(session, now)
        except Exception:
            logger.exception("nothing can be sent to session %s", session.name)
        line = session.line
        if line is None:
            return
        if line.gone:
            self._peers.release(line.peer)
            session.line = None
            self._detach(session, now, "gone")
        elif line.waits or session.dirty:
            self._agenda.by(max(now + RETRY, line.again))

    def watch(self, session: Session, now: float) -> None:
        """Its lease and its grace."""
        silent = session.heard + self._timing.lease
        if session.detached is None and now >= silent:
            self._detach(session, now, "silent")
        if session.detached is None:
            self._agenda.by(silent)
        elif now >= session.detached + self._timing.grace:
            self.end(session, "no sign of life", "not reachable")
        else:
            self._agenda.by(session.detached + self._timing.grace)

    def end(self, session: Session, told: str | None, reason: str) -> None:
        """Forget a session and its requests; `told`: what its client is told."""
        self._sessions.pop(session.key, None)
        aborted = self._requests.forget(session)
        if session.line is not None:
            if told is not None:
                session.line.post(wire.GoAway(reason=told))
            self._peers.release(session.line.peer)
            session.line = None
        self._log("session.close", session=session.name, client=session.client, reason=reason, aborted=aborted)

    def say_goodbye(self, reason: str) -> None:
        """Tell all clients, and those that come from here on, that it is over."""
        self.over = wire.GoAway(reason=reason)
        for session in self:
            if session.line is not None:
                session.line.post(self.over)

    def _send(self, peer: bytes, frames: list[bytes]) -> Sent:
        try:
            return self._send_raw(peer, frames)
        except Exception:
            logger.exception("sending failed")
            return Sent.GONE

    def _shows_token(self, hello: wire.Hello) -> bool:
        if self._token is None or hello.token is None:
            return False
        return hmac.compare_digest(hello.token.encode(), self._token.encode())

    def _close(self, peer: bytes) -> None:
        """Too much of what it sent was wrong: ignore it from here on."""
        session = self._peers.session(peer)
        self._log("peer.close", session=session.name if session is not None else None)
        if session is not None:
            self.end(session, "too many bad messages", "bad messages")
        self._peers.close(peer)

    def _welcome(self, peer: bytes, hello: wire.Hello, principal: str, now: float) -> None:
        session = self._sessions.get(key_of(hello.session)) if hello.session is not None else None
        if session is not None and session.principal != principal:
            session = None
        resumed = session is not None
        before = self._peers.session(peer)
        if before is not None and before is not session:
            self.end(before, None, "another Hello")
        if session is None:
            if len(self._sessions) >= self._limits.max_sessions:
                retry = self._requests.ledger.retry_after_ms(now)
                self.tell(peer, Code.QUEUE_FULL, f"there are {len(self._sessions)} sessions (max_sessions)", retry)
                return
            session = Session(self._urandom(16), principal, now)
            self._sessions[session.key] = session
        session.client, session.heard, session.detached = hello.client, now, None
        self._agenda.by(now + self._timing.lease)
        self._log("session.resume" if resumed else "session.open", session=session.name, client=session.client)
        self._connect(session, peer).post(self._greeting(session, resumed))
        self.flush(session, now)

    def _connect(self, session: Session, peer: bytes) -> Line:
        """The way to a client, who has to say what it got on the way that there was before, if that was another one."""
        old = session.line
        if old is not None and old.peer == peer:
            return old
        if old is not None:
            old.post(wire.GoAway(reason="the session goes on from another connection"))
            self._peers.release(old.peer)
        session.line = Line(self._send, peer)
        self._peers.bind(peer, session)
        for exchange in session.exchanges.values():
            exchange.delivery.paused = True
            exchange.blocked = None
        return session.line

    def _greeting(self, session: Session, resumed: bool) -> wire.Welcome:
        return wire.Welcome(
            proto=wire.VERSION,
            boot_id=self.boot_id,
            session=session.secret,
            resumed=resumed,
            model=self._facts.model,
            vocab_size=self._facts.vocab_size,
            max_model_len=self._facts.max_model_len,
            limits=self._limits.asdict(),
            ping_ms=round(self._timing.ping * 1000),
            lease_ms=round(self._timing.lease * 1000),
            grace_ms=round(self._timing.grace * 1000),
            value_functions=self._facts.value_functions,
        )

    def _detach(self, session: Session, now: float, reason: str) -> None:
        if session.detached is None:
            session.detached = now
            self._agenda.by(now + self._timing.grace)
            self._log("session.detach", session=session.name, client=session.client, reason=reason)

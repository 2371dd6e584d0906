"""A client as the service knows it: its secret, the way to it, and its requests."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from pagefork import wire

from .seam import Send, Sent

if TYPE_CHECKING:
    from .exchange import Exchange

RETRY = 0.02  # seconds until a peer that does not read is tried again
_LONGEST_RETRY = 0.3
_QUEUED = 256  # messages for a peer that does not read; one more, and it counts as gone
_BAD_FRAMES = 20
_CLOSED_PEERS = 4096
_STRANGERS = 1024


class Agenda:
    """When something is due, in seconds of the service's clock; sooner than needed does no harm."""

    def __init__(self, due: float) -> None:
        self.due = due

    def by(self, when: float) -> None:
        """Something is due then."""
        self.due = min(self.due, when)


class Line:
    """The way to a peer. What post() is given goes out in order; `gone` when the peer is, or reads nothing at all.

    full: it does not read what was sent. again: not before then is it worth to encode more for it.
    """

    def __init__(self, send: Send, peer: bytes) -> None:
        self.peer = peer
        self.gone = False
        self.full = False
        self.again = float("-inf")
        self._pause = RETRY
        self._send = send
        self._queue: deque[list[bytes]] = deque()

    @property
    def waits(self) -> bool:
        """Whether a message waits for the peer to read."""
        return bool(self._queue)

    def post(self, message: wire.EngineMessage) -> None:
        """Send a message, later if need be."""
        self.post_frames(wire.encode(message))

    def post_frames(self, frames: list[bytes]) -> None:
        """Send frames, later if need be."""
        if not self.push(frames) and not self.gone:
            self._queue.append(frames)
            self.gone = len(self._queue) > _QUEUED

    def push(self, frames: list[bytes]) -> bool:
        """Send frames if that can be done at once, after all that was posted."""
        return self.flush() and self._sent(frames)

    def flush(self) -> bool:
        """Send what was posted; whether all of it is sent."""
        while self._queue and self._sent(self._queue[0]):
            self._queue.popleft()
        return not self._queue and not self.gone

    def rest(self, now: float) -> None:
        """Wait before the next attempt: longer and longer while the peer does not read."""
        self._pause = min(2 * self._pause, _LONGEST_RETRY) if self.full else RETRY
        self.again = now + self._pause if self.full else now

    def _sent(self, frames: list[bytes]) -> bool:
        if self.gone:
            return False
        sent = self._send(self.peer, frames)
        self.gone, self.full = sent is Sent.GONE, sent is Sent.FULL
        return sent is Sent.OK


class Session:
    """One client. `line`: None while it can't be reached. Times are seconds of the service's clock."""

    def __init__(self, secret: bytes, principal: str, now: float) -> None:
        self.secret = secret
        self.key = key_of(secret)
        self.principal = principal
        self.client = ""  # as it calls itself
        self.line: Line | None = None
        self.heard = now
        self.detached: float | None = None  # since when it is not reachable, or was silent for too long
        self.bad_frames = 0
        self.replayed = 0.0  # bytes of what it was sent again, less with time
        self.replayed_at = now
        self.stats_asked = 0  # and not answered
        self.exchanges: dict[str, Exchange] = {}  # by rid, those kept too
        self.dirty: dict[Exchange, None] = {}  # that may have something to send, in order

    @property
    def name(self) -> str:
        """For logs; says nothing of the secret."""
        return self.key.hex()[:8]

    def post(self, message: wire.EngineMessage) -> None:
        """Send a message, later if need be; lost, where the client can't be reached."""
        if self.line is not None:
            self.line.post(message)


def key_of(secret: bytes) -> bytes:
    """What a session is looked up by: how long that takes says nothing of the secrets there are."""
    return hashlib.sha256(secret).digest()


class Peers:
    """Which peer speaks for which session. Remembers some of those that were closed, and bad frames of strangers."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}
        self._closed: OrderedDict[bytes, None] = OrderedDict()
        self._strangers: OrderedDict[bytes, int] = OrderedDict()

    def session(self, peer: bytes) -> Session | None:
        """Whose peer it is."""
        return self._sessions.get(peer)

    def is_closed(self, peer: bytes) -> bool:
        """Whether nothing of it is read any more."""
        return peer in self._closed

    def bind(self, peer: bytes, session: Session) -> None:
        """From here on it speaks for this session."""
        self._strangers.pop(peer, None)
        self._sessions[peer] = session

    def release(self, peer: bytes) -> None:
        """It speaks for nobody."""
        self._sessions.pop(peer, None)

    def close(self, peer: bytes) -> None:
        """Ignore it."""
        self.release(peer)
        self._strangers.pop(peer, None)
        self._closed[peer] = None
        if len(self._closed) > _CLOSED_PEERS:
            self._closed.popitem(last=False)

    def strike(self, peer: bytes) -> bool:
        """Count a bad frame; whether it was one too many."""
        session = self._sessions.get(peer)
        if session is not None:
            session.bad_frames += 1
            return session.bad_frames >= _BAD_FRAMES
        count = self._strangers.pop(peer, 0) + 1
        self._strangers[peer] = count
        if len(self._strangers) > _STRANGERS:
            self._strangers.popitem(last=False)
        return count >= _BAD_FRAMES

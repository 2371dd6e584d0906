"""One client's connection to an engine, without input and output: Hello, pings, and what to do when it breaks."""

from __future__ import annotations

import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from pagefork.wire import ClientMessage, Code, GoAway, Hello, Ping, Welcome, encode

logger = logging.getLogger("pagefork")

UNANSWERED_PINGS = 2  # then the connection is given up
_HELLO_SECONDS = 2.0  # how long an attempt to connect waits for Welcome
_FIRST_PAUSE, _LONG_PAUSE = 0.05, 2.0  # seconds between attempts, twice as many each time
_WANTED_PAUSE = 0.2  # at most, while somebody waits
_LEAST_PING = 0.01  # seconds
_SHORT_LIFE, _MOST_SHORT_LIVES = 0.1, 10  # seconds of a connection that broke; so many in a row are no accident
_NOT_WELCOME = (Code.UNAUTHENTICATED, Code.VERSION)  # trying again would not help


class Phase(Enum):
    """Where the connection stands."""

    DOWN = "down"
    OPENING = "opening"  # Welcome has not come
    UP = "up"
    CLOSED = "closed"


class Lost(NamedTuple):
    """Why all that the engine knew of this client is gone."""

    reason: str
    code: str = Code.ENGINE_LOST
    retry_after_ms: int | None = None


class Link(ABC):
    """Keeps a connection: says when one is wanted, and goes on with the session of one that broke, if that can be.

    `connection`: the number of the one that is wanted, each time another one; None: none is. Who owns it makes that one, and
    tells by opened() and broken() what becomes of it.
    """

    def __init__(self, name: str, session: bytes | None, reconnect_timeout: float, clock: Callable[[], float]) -> None:
        self.welcome: Welcome | None = None
        self.session = session
        self.connection: int | None = None
        self.phase = Phase.DOWN
        self._name = name
        self._reconnect_timeout = reconnect_timeout
        self._clock = clock
        self._numbers = itertools.count(1)
        self._messages: list[list[bytes]] = []
        self._due = math.inf  # DOWN: the next attempt; OPENING: its end; UP: the next ping
        self._resume_by = math.inf  # until then the session may be gone on with
        self._failures = 0
        self._unanswered = 0
        self._up_since = -math.inf
        self._short_lives = 0
        self._trouble = Lost("no attempt to connect was made")  # the last one

    @property
    @abstractmethod
    def wanted(self) -> bool:
        """Whether somebody waits."""

    @abstractmethod
    def lose(self, lost: Lost) -> None:
        """End what the engine was asked for in this session."""

    @abstractmethod
    def refuse(self, lost: Lost) -> None:
        """End what waits for a connection."""

    def opened(self, token: str | None = None) -> None:
        """The connection that is wanted is there, or will be soon."""
        self.send(Hello(client=self._name, token=token, session=self.session))

    def broken(self, reason: str, code: Code | None = None) -> None:
        """The connection is gone, or could not be made; with a code, by the other side's decision."""
        if self.phase not in (Phase.OPENING, Phase.UP):
            return
        self._trouble = Lost(reason, code or Code.ENGINE_LOST)
        was_up = self.phase is Phase.UP
        self._drop()
        if was_up:
            self._interrupted()
        elif code in _NOT_WELCOME:
            self._due = math.inf
            self._forget(self._trouble)
            self.refuse(self._trouble)
        else:
            self._pause(_FIRST_PAUSE * 2 ** min(self._failures, 10))
            self._failures += 1

    def send(self, message: ClientMessage) -> None:
        """Over the connection."""
        self._messages.append(encode(message))

    def take_messages(self) -> list[list[bytes]]:
        """What is to be sent over the connection, in order."""
        messages, self._messages = self._messages, []
        return messages

    def want(self) -> None:
        """Somebody waits."""
        if self.phase is Phase.DOWN:
            self._due = min(self._due, self._clock() + (_WANTED_PAUSE if self._failures else 0.0))

    def keep(self, now: float) -> float:
        """Do what is due for the connection; when something will be."""
        if now >= self._resume_by:
            self._forget(Lost(f"the engine is gone: {self._trouble.reason}"))
            if self.phase is Phase.OPENING:  # with the session that was just given up
                self._drop()
                self._due = now
        if now >= self._due:
            if self.phase is Phase.DOWN:
                self.phase, self.connection = Phase.OPENING, next(self._numbers)
                self._due = now + _HELLO_SECONDS
            elif self.phase is Phase.OPENING:
                self.broken(f"no Welcome within {_HELLO_SECONDS:g} s")
            else:
                self._ping(now)
        return min(self._due, self._resume_by)

    def heard(self) -> None:
        """A message came: the engine lives."""
        self._unanswered = 0

    def welcomed(self, message: Welcome) -> None:
        """The engine knows this client: from the session before, or as a new one."""
        before, self.welcome = self.welcome, message
        if not message.resumed:
            self._forget(Lost("the engine does not know this session any more"))
        elif before is not None and before.boot_id != message.boot_id:
            self._forget(Lost("another engine has taken its place"))
        self.phase, self.session, self._resume_by = Phase.UP, message.session, math.inf
        self._failures = self._unanswered = 0
        self._up_since = self._clock()
        self._due = self._up_since + self._ping_seconds

    def sent_away(self, message: GoAway) -> None:
        """The engine ends the session."""
        self.abandon(Lost(f"the engine sent this client away: {message.reason}", retry_after_ms=message.retry_after_ms))

    def abandon(self, lost: Lost) -> None:
        """Have done with this session, and begin anew after a while."""
        self._trouble = lost
        self._drop()
        self._forget(lost)
        self._pause(_LONG_PAUSE if lost.retry_after_ms is None else lost.retry_after_ms / 1e3)

    def shut(self, lost: Lost) -> None:
        """For good. Messages that are left can still be taken."""
        self.phase, self._due = Phase.CLOSED, math.inf
        self._forget(lost)
        self.refuse(lost)

    @property
    def _ping_seconds(self) -> float:
        assert self.welcome is not None
        return max(self.welcome.ping_ms / 1e3, _LEAST_PING)

    def _interrupted(self) -> None:
        """The session may go on over another connection, unless that is what breaks them."""
        logger.info("the connection to the engine broke: %s", self._trouble.reason)
        now = self._clock()
        self._short_lives = self._short_lives + 1 if now < self._up_since + _SHORT_LIFE else 0
        if self._short_lives < _MOST_SHORT_LIVES:
            self._due, self._resume_by = now, now + self._reconnect_timeout
        else:
            self._short_lives = 0
            self.abandon(Lost(f"connections break again and again: {self._trouble.reason}"))

    def _ping(self, now: float) -> None:
        if self._unanswered >= UNANSWERED_PINGS:
            self.broken(f"no answer to {self._unanswered} pings")
            return
        self._unanswered += 1
        self._due = now + self._ping_seconds
        self.send(Ping(t=next(self._numbers)))

    def _pause(self, seconds: float) -> None:
        waiting = self.wanted or self._resume_by < math.inf
        self._due = self._clock() + min(seconds, _WANTED_PAUSE if waiting else _LONG_PAUSE)

    def _drop(self) -> None:
        self.phase, self.connection = Phase.DOWN, None
        self._messages.clear()

    def _forget(self, lost: Lost) -> None:
        self.session, self._resume_by = None, math.inf
        self.lose(lost)

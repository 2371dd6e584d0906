"""One request's stream, for a reader that waits in its own thread."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Self

from pagefork.outputs import RequestOutput
from pagefork.scheduler.errors import ServiceError
from pagefork.wire import Accepted, Code, Delta

from .connection import Connection
from .reading import Reading
from .request import Event


class Mailbox:
    """Events from the client's thread for one that waits."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._news = threading.Condition()

    def put(self, event: Event) -> None:
        """Called by the client's thread."""
        with self._news:
            self._events.append(event)
            self._news.notify()

    @property
    def first(self) -> Event | None:
        """The next event, if it is here."""
        with self._news:
            return self._events[0] if self._events else None

    def get(self) -> Event:
        """Wait for the next event."""
        with self._news:
            while not self._events:
                self._news.wait()
            return self._events.popleft()


class Stream:
    """The deltas of a request, each given once, in order. One thread at a time reads it.

    Leaving it ends the request: close(), the end of `with`, or dropping it. Errors are raised when everything that came
    before them was read: ServiceError, whose `output` holds what there is.
    """

    def __init__(self, client: object, connection: Connection, mailbox: Mailbox, reading: Reading) -> None:
        self._client = client  # lives as long as its streams
        self._connection = connection
        self._mailbox = mailbox
        self._reading = reading
        self._left = False

    @property
    def unread(self) -> Event | None:
        """The first event that nobody has taken, for the client; None: there is none."""
        return self._mailbox.first

    @property
    def request_id(self) -> str:
        return self._reading.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        while (delta := self._reading.next()) is None:
            if self._reading.error is not None:
                raise self._reading.error
            if self._reading.over or self._left:
                raise StopIteration
            self._take()
        return delta

    def accepted(self) -> Accepted:
        """Wait until the engine has the request. Raises ServiceError when it is refused."""
        while self._reading.accepted is None and not self._reading.over and not self._left:
            self._take()
        if self._reading.accepted is None and self._reading.error is not None:
            raise self._reading.error
        return self._reading.accepted or Accepted(rid=self.request_id)

    def result(self) -> RequestOutput:
        """Read to the end; the whole output. Raises ServiceError."""
        for _ in self:
            pass
        return self._reading.output()

    def abort(self) -> None:
        """End the request. What has come can be read; result() has finish_reason "abort", or no outputs where none had begun."""
        rid, mailbox, self._reading.aborting = self.request_id, self._mailbox, True
        self._connection.later(lambda state: state.abort(rid, mailbox))

    def close(self) -> None:
        """End the request, if it has not ended; nothing more comes of it, and who waits for it waits no longer."""
        self._leave()
        self._reading.aborting = True
        self._mailbox.put(ServiceError(Code.CANCELLED, "its reader left"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._left and not self._reading.over:
            rid, mailbox = self.request_id, self._mailbox
            self._connection.later(lambda state: state.leave(rid, mailbox))
        self._left = True

    def _take(self) -> None:
        self._connection.check_process()
        self._reading.take(self._mailbox.get())

"""One request's stream, for a reader in an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Self

from pagefork.outputs import RequestOutput
from pagefork.scheduler.errors import ServiceError
from pagefork.wire import Accepted, Code, Delta

from .connection import Connection
from .reading import Reading
from .request import Event


class AsyncMailbox:
    """Events for a reader in the loop. Belongs to the loop's thread."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._news.set()

    @property
    def first(self) -> Event | None:
        """The next event, if it is here."""
        return self._events[0] if self._events else None

    async def get(self) -> Event:
        """Wait for the next event."""
        while not self._events:
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()


class AsyncStream:
    """The deltas of a request, each given once, in order. One task at a time reads it.

    Leaving it ends the request: aclose(), the end of `async with`, or dropping it. Errors are raised when everything that
    came before them was read: ServiceError, whose `output` holds what there is.
    """

    def __init__(self, client: object, connection: Connection, mailbox: AsyncMailbox, reading: Reading) -> None:
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

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while (delta := self._reading.next()) is None:
            if self._reading.error is not None:
                raise self._reading.error
            if self._reading.over or self._left:
                raise StopAsyncIteration
            await self._take()
        return delta

    async def accepted(self) -> Accepted:
        """Wait until the engine has the request. Raises ServiceError when it is refused."""
        while self._reading.accepted is None and not self._reading.over and not self._left:
            await self._take()
        if self._reading.accepted is None and self._reading.error is not None:
            raise self._reading.error
        return self._reading.accepted or Accepted(rid=self.request_id)

    async def result(self) -> RequestOutput:
        """Read to the end; the whole output. Raises ServiceError."""
        async for _ in self:
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

    async def aclose(self) -> None:
        """close(), for contextlib.aclosing."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._left and not self._reading.over:
            rid, mailbox = self.request_id, self._mailbox
            self._connection.later(lambda state: state.leave(rid, mailbox))
        self._left = True

    async def _take(self) -> None:
        self._connection.check_process()
        self._reading.take(await self._mailbox.get())

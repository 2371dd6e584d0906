"""One connection of the gateway: uvicorn's, with bounds for what a client can hold by sending or reading nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


class Connection(H11Protocol):
    """h11 bounds the bytes of a head. This bounds its time, and notices a client that leaves although it sent more.

    head_seconds: what a head may take to arrive. unread_seconds: how long a complete answer may lie unread.
    """

    head_seconds = 30.0
    unread_seconds = 60.0
    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._is_busy() and not self.cycle.more_body:
            # A request before the answer to the last one. Read, it would stop the reading, and with it the news that the
            # client has left; its client sends it again over the next connection.
            self.cycle.keep_alive = False
            return
        super().data_received(data)
        if self._is_busy():
            self._drop_head_timer()
        elif self._head is None:
            self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if size := self.transport.get_write_buffer_size():
            self._watch(self.cycle, size)

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_head_timer()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _drop_head_timer(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _watch(self, cycle: RequestResponseCycle, size: int) -> None:
        """Look later whether the client has read any of the `size` bytes that wait for it."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left and cycle is self.cycle:
                if left < size:
                    self._watch(cycle, left)
                else:
                    self.transport.abort()

        if self._unread is not None:
            self._unread.cancel()
        self._unread = self.loop.call_later(self.unread_seconds, look)


def connections(unread_seconds: float, head_seconds: float) -> type[Connection]:
    """The class of connections with these bounds."""
    bounds: dict[str, Any] = {"unread_seconds": unread_seconds, "head_seconds": head_seconds}
    return type("BoundConnection", (Connection,), bounds)

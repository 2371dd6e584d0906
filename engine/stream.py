"""One request's way from the engine to whoever reads it."""

from __future__ import annotations

import asyncio

from .engine_thread import Queued
from .outputs import RequestOutput


class Stream:
    """Holds the newest output that was not read: a slow reader skips some, never the last. Belongs to the loop's thread.

    It ends once, with a finished output or with an error.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ended = asyncio.Event()
        self._newest: RequestOutput | None = None
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def put(self, event: RequestOutput | Exception | Queued) -> None:
        """The next output, or what ends the request without one."""
        if isinstance(event, Queued):
            return
        if isinstance(event, RequestOutput):
            self._newest = event
        if isinstance(event, Exception):
            self._error = event
            self.ended.set()
        elif event.finished:
            self._error = event.error
            self.ended.set()
        self._news.set()

    async def next(self) -> RequestOutput | None:
        """Wait for an output that was not read; None after the last, or the error that ended the request."""
        while self._newest is None and not self.ended.is_set():
            self._news.clear()
            await self._news.wait()
        output, self._newest = self._newest, None
        if output is None and self._error is not None:
            raise self._error
        return output

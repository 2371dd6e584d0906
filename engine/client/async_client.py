"""AsyncClient: an engine in another process, for programs with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self, overload

from pagefork.outputs import RequestOutput
from pagefork.scheduler.errors import EngineMisuseError, ServiceError
from pagefork.scheduler.params import CommonParams
from pagefork.wire import Ping, Pong, Stats, StatsReply, Welcome

from .async_stream import AsyncMailbox, AsyncStream
from .base import Base, deliver
from .prompts import Prompt, Submission
from .request import Event, Sink


class AsyncClient(Base):
    """A client of an engine that `pagefork serve` runs, for one event loop; the arguments are those of Client.

        async with AsyncClient() as client:
            async for delta in client.stream("def main("):
                print(delta.text, end="")

    Nothing waits for a connection but connect(), which `async with` calls: a request made before is sent once there is one.
    Another thread talks to the engine, so a loop that is busy loses no connection.
    """

    def __init__(
        self,
        address: str = "default",
        *,
        token: str | None = None,
        server_key: str | None = None,
        key: str | None = None,
        name: str = "",
        session: bytes | None = None,
        connect_timeout: float = 10.0,
        reconnect_timeout: float = 1.5,
        window: int = 256,
    ) -> None:
        try:
            loop = self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise EngineMisuseError("an AsyncClient is made where an event loop runs; use Client where none does") from None

        def post(events: Sequence[tuple[Sink, Event]]) -> None:
            loop.call_soon_threadsafe(deliver, events)

        super().__init__(post, address, token, server_key, key, name, session, connect_timeout, reconnect_timeout, window)

    async def connect(self) -> Welcome:
        """Wait for a connection. Raises ServiceError when it is refused or takes longer than `connect_timeout`."""
        welcome: Welcome = await asyncio.wrap_future(self._ask(None))
        return welcome

    @overload
    async def generate(
        self,
        prompts: str | list[int],
        params: CommonParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> RequestOutput: ...

    @overload
    async def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: CommonParams | Sequence[CommonParams] | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[RequestOutput]: ...

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: CommonParams | Sequence[CommonParams] | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """As Client.generate."""
        made, alone = self._submissions(prompts, params, request_id, priority, deadline)
        streams = [self._stream(one) for one in made]
        try:
            if alone:
                return await streams[0].result()
            return [await self._result(streams, number, made) for number in range(len(made))]
        finally:
            for stream in streams:
                stream.close()

    def stream(
        self,
        prompt: Prompt,
        params: CommonParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> AsyncStream:
        """Complete one prompt: what its outputs grow by, as it comes."""
        return self._stream(self._submission(prompt, params, request_id, priority, deadline, stream=True))

    def attach(self, request_id: str) -> AsyncStream:
        """The stream of a request that an earlier client of this session sent, from its beginning."""
        return self._stream(self._attachment(request_id))

    async def stats(self) -> StatsReply:
        """Numbers of the engine and of its service."""
        reply: StatsReply = await asyncio.wrap_future(self._ask(Stats))
        return reply

    async def health(self) -> Pong:
        """How the engine is now. Raises ServiceError when it does not answer."""
        reply: Pong = await asyncio.wrap_future(self._ask(Ping))
        return reply

    async def close(self, *, keep_session: bool = False) -> None:
        """End all requests and the connection. keep_session: let them run on, for another client with this `session`."""
        await asyncio.to_thread(self._connection.close, keep_session)

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def _stream(self, made: Submission) -> AsyncStream:
        if asyncio.get_running_loop() is not self._loop:
            raise EngineMisuseError("an AsyncClient belongs to the event loop that it was made in; call it from that loop only")
        mailbox = AsyncMailbox()
        stream = AsyncStream(self, self._connection, mailbox, self._reading(made, mailbox))
        self._send(made, mailbox)
        return stream

    async def _result(self, streams: list[AsyncStream], number: int, made: list[Submission]) -> RequestOutput:
        at_once = number > 0
        while True:
            try:
                return await streams[number].result()
            except ServiceError as error:
                outcome, at_once = self._outcome(error, made[number], at_once), False
            if isinstance(outcome, RequestOutput):
                return outcome
            await asyncio.sleep(outcome)
            for one in self._again(streams, number):
                made[one] = made[one].again()
                streams[one] = self._stream(made[one])

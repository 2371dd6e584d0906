"""The requests of one call while they run: their pieces in the order in which they come, or their ends."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from pagefork.client.async_client import AsyncClient
from pagefork.client.async_stream import AsyncStream
from pagefork.outputs import Logprob, RequestOutput
from pagefork.scheduler.params import CommonParams

from .schemas import PromptDetails, Usage

Prompt = str | list[int]

_AHEAD = 4  # pieces that wait for a slow reader, before they wait in the engine


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a request over HTTP asks for: one request of the service for each prompt.

    include_usage: of stream_options. deadline: seconds.
    """

    model: str
    prompts: list[Prompt]
    params: CommonParams
    stream: bool
    include_usage: bool
    priority: int = 0
    deadline: float | None = None
    prefix: str = "cmpl"
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.id or f"{self.prefix}-{secrets.token_hex(12)}")

    @property
    def choices(self) -> int:
        """Outputs of each prompt."""
        return getattr(self.params, "n", 1)

    def options(self, at: int) -> dict[str, Any]:
        """Of the request for one prompt."""
        return {"request_id": f"{self.id}-{at}", "priority": self.priority, "deadline": self.deadline}


class Piece(NamedTuple):
    """What a choice has grown by."""

    choice: int
    tokens: list[int]
    text: str
    logprobs: list[dict[int, Logprob]] | None


class End(NamedTuple):
    """A prompt's request is complete, and all its pieces have come. `at`: which prompt."""

    at: int
    output: RequestOutput


async def complete(client: AsyncClient, call: Call) -> list[RequestOutput]:
    """The outputs of all prompts. When one of them fails, or this is cancelled, none is computed any further."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(client.generate(prompt, call.params, **call.options(at)))
                for at, prompt in enumerate(call.prompts)
            ]
    except ExceptionGroup as error:
        raise error.exceptions[0] from None
    return [task.result() for task in tasks]


class Streaming:
    """The streams of a call, read at the pace of the one who iterates over the pieces. Leaving ends them in the engine."""

    def __init__(self, client: AsyncClient, call: Call) -> None:
        self._call = call
        self._streams = [client.stream(prompt, call.params, **call.options(at)) for at, prompt in enumerate(call.prompts)]
        self._queue: asyncio.Queue[Piece | End | Exception] = asyncio.Queue(_AHEAD)
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for stream in self._streams:
            await self._stack.enter_async_context(stream)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def accepted(self) -> None:
        """Wait until the engine has all requests, and begin to read. Raises ServiceError for one that is refused."""
        for stream in self._streams:
            await stream.accepted()
        self._tasks = [asyncio.create_task(self._read(at, stream)) for at, stream in enumerate(self._streams)]

    async def __aiter__(self) -> AsyncIterator[Piece | End]:
        left = len(self._streams)
        while left:
            event = await self._queue.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, End)
            yield event

    async def _read(self, at: int, stream: AsyncStream) -> None:
        """Pass on what one stream brings."""
        first = at * self._call.choices
        try:
            async for delta in stream:
                await self._queue.put(Piece(first + delta.index, delta.tokens, delta.text, delta.logprobs))
            await self._queue.put(End(at, await stream.result()))
        except Exception as error:  # noqa: BLE001 - whoever reads the pieces raises it
            await self._queue.put(error)


def usage_of(outputs: list[RequestOutput], *, scoring: bool = False) -> Usage:
    """What all prompts took. scoring: what was generated was not asked for."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = 0 if scoring else sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(output.metrics.cached_tokens for output in outputs)),
    )

"""Answers to calls: whole or as a stream of events, and the end of the call when nobody reads it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from starlette.types import Message, Receive, Scope, Send

from pagefork.outputs import CompletionOutput, RequestOutput
from pagefork.scheduler.errors import InvalidRequestError, ServiceError

from .errors import ApiError, json_response, to_json
from .gateway import Gateway
from .refusals import as_api_error
from .running import Call, End, Piece, Streaming, complete

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_DONE = b"data: [DONE]\n\n"


class _UnreadError(Exception):
    """The client takes nothing of what it is sent."""


class Shape(Protocol):
    """How a route tells of outputs. A None is no event."""

    @property
    def call(self) -> Call: ...

    def answer(self, outputs: list[RequestOutput]) -> Any: ...

    def opening(self) -> Sequence[Any]: ...

    def piece(self, piece: Piece) -> Any: ...

    def ending(self, choice: int, completion: CompletionOutput) -> Any: ...

    def usage(self, outputs: list[RequestOutput]) -> Any: ...


class Answer:
    """The answer to a call, an ASGI application. A client that leaves ends the call, and with it its requests in the engine."""

    def __init__(self, gateway: Gateway, shape: Shape) -> None:
        self._gateway = gateway
        self._shape = shape
        self._began = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["call"] = self._shape.call.id
        send = _patient(send, self._gateway.config.unread_seconds)
        work = self._stream(send) if self._shape.call.stream else self._whole(scope, receive, send)
        try:
            await self._told(work, scope, receive, send)
        except _UnreadError as error:
            scope["state"]["error"] = str(error)
            if (abort := scope["state"].get("abort")) is not None:
                abort()  # closed in the usual way, the connection would wait until its client has read the rest
                await asyncio.sleep(0)

    async def _told(self, work: Awaitable[None], scope: Scope, receive: Receive, send: Send) -> None:
        """Do the work; where it fails once the answer has begun, end that with an event that says so."""
        try:
            await self._until_left(work, receive)
        except (ApiError, InvalidRequestError, ServiceError) as error:
            refusal = as_api_error(error)
            if not self._began:
                raise refusal from None
            scope["state"]["error"] = refusal.message
            await send(_event(refusal.body()) | {"more_body": False})  # and no [DONE]

    async def _until_left(self, work: Awaitable[None], receive: Receive) -> None:
        """Do the work, unless the client leaves or the gateway is to stop before it is done."""
        worker = asyncio.ensure_future(work)
        left, stopping = asyncio.create_task(_left(receive)), asyncio.create_task(self._gateway.stopping.wait())
        try:
            await asyncio.wait({worker, left, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if worker.done():
                worker.result()
            elif not left.done():
                raise ApiError(503, "the server is stopping", code="draining", headers={"retry-after": "1"})
        finally:
            for task in (worker, left, stopping):
                task.cancel()
            await asyncio.gather(worker, left, stopping, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        outputs = await complete(self._gateway.client, self._shape.call)
        response = json_response(self._shape.answer(outputs))
        self._began = True
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        shape, call = self._shape, self._shape.call
        outputs: dict[int, RequestOutput] = {}
        async with Streaming(self._gateway.client, call) as streaming:
            await streaming.accepted()  # until then a refusal has a status of its own
            self._began = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            for event in shape.opening():
                await send(_event(event))
            async for event in streaming:
                if isinstance(event, Piece):
                    if (shown := shape.piece(event)) is not None:
                        await send(_event(shown))
                else:
                    outputs[event.at] = event.output
                    await self._end(event, send)
        if call.include_usage:
            await send(_event(shape.usage([outputs[at] for at in sorted(outputs)])))
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    async def _end(self, end: End, send: Send) -> None:
        first = end.at * self._shape.call.choices
        for completion in end.output.outputs:
            await send(_event(self._shape.ending(first + completion.index, completion)))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _patient(send: Send, seconds: float) -> Send:
    """`send`, which raises _UnreadError where it has to wait so long for a client that reads nothing."""

    async def wait(message: Message) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError:
            raise _UnreadError(f"the client read nothing for {seconds:g} s") from None

    return wait


def _event(value: Any) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + to_json(value) + b"\n\n", "more_body": True}

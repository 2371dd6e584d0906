"""AsyncLLMEngine: requests in, streams of outputs out, for asyncio services."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from enum import Enum
from typing import Any, Self, TypeVar

from pagefork.scheduler.errors import EngineDeadError, EngineMisuseError, InvalidRequestError
from pagefork.scheduler.params import CommonParams

from .config import EngineConfig
from .core import LLMEngine
from .engine_thread import EngineThread
from .outputs import EngineStats, RequestOutput
from .prompts import Prompt
from .stream import Stream
from .tokenizer import Tokenizer
from .value_functions import MakesValueFunction

logger = logging.getLogger("pagefork")

T = TypeVar("T")


class _State(Enum):
    """The life of an engine, in this order; it is lived once."""

    NEW = 0
    LOADING = 1
    RUNNING = 2
    DRAINING = 3
    DEAD = 4


class AsyncLLMEngine:
    """An LLMEngine in a thread of its own, for one event loop.

        async with AsyncLLMEngine(EngineConfig(model="demo")) as engine:
            async for output in engine.generate("def main("):
                print(output.outputs[0].text)

    All methods belong to the loop that start() was called in, and so do this object's fields and its streams; the
    LLMEngine belongs to its thread, and EngineThread says how the two meet. A request has a stream from
    generate() until its terminal event, and exactly one such event: the thread's, or the reader's leaving, or
    EngineDeadError for all that are left when the thread has ended.

    `tokenizer` (immutable) and `max_model_len` are those of LLMEngine, from start() on.
    """

    tokenizer: Tokenizer | None
    max_model_len: int

    def __init__(self, config: EngineConfig, value_functions: Mapping[str, MakesValueFunction] | None = None) -> None:
        self.config = config
        self._value_functions = value_functions
        self._state = _State.NEW
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        self._thread: EngineThread[Stream]
        self._ended: asyncio.Future[BaseException | None]
        self._streams: dict[str, Stream] = {}
        self._calls: set[Future[Any]] = set()
        self._ids = itertools.count()

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted: from the end of start() to shutdown() or a failure."""
        return self._state is _State.RUNNING

    async def start(self) -> None:
        """Load the model, in the engine's thread. Raises what LLMEngine raises: ModelError, ConfigError.

        Cancelled while it loads, it shuts the engine down.
        """
        if self._state is not _State.NEW:
            raise EngineMisuseError("an AsyncLLMEngine starts once; make a new one")
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(self.config, lambda: self._loop.call_soon_threadsafe(self._deliver), self._value_functions)
        self._ended = asyncio.wrap_future(self._thread.ended)
        self._ended.add_done_callback(self._end)
        self._thread.start()
        self._state = _State.LOADING
        try:
            self.tokenizer, self.max_model_len = await self._call(lambda engine: (engine.tokenizer, engine.max_model_len))
        except asyncio.CancelledError:
            self._stop(0)
            raise
        except EngineDeadError:
            if self._failure is not None:
                raise self._failure from None
            raise
        if self._state is not _State.LOADING:
            raise self._dead()
        self._state = _State.RUNNING

    async def shutdown(self, drain: float | None = 0) -> None:
        """Accept nothing more, let running requests go on for `drain` seconds (None: to their end), and free the model.

        Requests that are not over by then end with finish_reason "abort"; what was not read can still be read. Several
        calls may overlap: the shortest `drain` counts. Called while start() loads, it waits for it.
        """
        if drain is not None and not drain >= 0:
            raise EngineMisuseError(f"drain={drain!r} must be seconds, 0 or more, or None to wait for all requests")
        if self._state is _State.NEW:
            self._state = _State.DEAD
        elif self._state is not _State.DEAD:
            if self._loop.is_closed():  # nobody reads any more; whoever calls may free the model
                self._thread.stop(0)
                await asyncio.to_thread(self._thread.join)
                self._state = _State.DEAD
                return
            self._check_loop()
            self._stop(drain)
            await asyncio.shield(self._ended)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()

    async def generate(
        self, prompt: Prompt, params: CommonParams | None = None, request_id: str | None = None, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt: cumulative outputs as they come, the last with `finished`. A slow reader skips some.

        params: None for the model's generation_config. request_id: None for a number. Nothing is queued before the
        first output is asked for. A reader that is cancelled, raises or closes the generator (contextlib.aclosing
        does it at once) aborts the request. Raises InvalidRequestError before the first output; after the last
        one, which holds what there was, its `error`, if it has one; EngineDeadError when the engine fails, or is
        shut down before the request is made.
        """
        stream = self._open(prompt, params, request_id, priority)
        try:
            while (output := await stream.next()) is not None:
                yield output
        finally:
            if not stream.ended.is_set():
                self._forget(stream)
                self._thread.discard(stream.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request and wait until its stream has the last output, of finish_reason "abort". Unknown ids are ignored."""
        self._check_alive()
        stream = self._streams.get(request_id)
        if stream is not None:
            self._thread.abort(request_id)
            await stream.ended.wait()

    async def stats(self) -> EngineStats:
        """Numbers of a moment between two steps, and totals since the start."""
        return await self._call(LLMEngine.stats)

    async def check(self) -> None:
        """Raise BlockAccountingError when the block accounting is wrong."""
        await self._call(LLMEngine.check)

    async def info(self) -> dict[str, Any]:
        """What was loaded and how it runs: model, memory (bytes), cache, device, CPU path."""
        return await self._call(LLMEngine.info)

    async def default_params(self) -> CommonParams:
        """What generate() takes for params=None: parameters from the model's generation_config."""
        return await self._call(LLMEngine.default_params)

    def _open(self, prompt: Prompt, params: CommonParams | None, request_id: str | None, priority: int) -> Stream:
        self._check_alive()
        if self._state is _State.DRAINING:
            raise self._dead()
        if request_id is None:
            request_id = next(name for name in map(str, self._ids) if name not in self._streams)
        if not isinstance(request_id, str):
            raise InvalidRequestError(f"request_id={request_id!r} must be a text that is not empty")
        if request_id in self._streams:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a request that has not finished")
        if isinstance(prompt, list):
            prompt = tuple(prompt)  # the caller may change the list while the engine's thread has yet to read it
        stream = self._streams[request_id] = Stream(request_id)
        self._thread.add(stream, prompt, params, priority)
        return stream

    async def _call(self, function: Callable[[LLMEngine], T]) -> T:
        if self._state is not _State.LOADING:
            self._check_alive()
        future = self._thread.call(function)
        self._calls.add(future)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._calls.discard(future)

    def _stop(self, drain: float | None) -> None:
        if self._state is not _State.DEAD:
            self._state = _State.DRAINING
            self._thread.stop(drain)

    def _deliver(self) -> None:
        for stream, event in self._thread.take().items():
            stream.put(event)
            if stream.ended.is_set():
                self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        stream.ended.set()
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]

    def _end(self, ended: asyncio.Future[BaseException | None]) -> None:
        """The thread is over. Its outputs were delivered before; whoever is still waiting waits in vain."""
        self._failure = ended.result()
        if self._failure is not None and self._state is not _State.LOADING:
            logger.critical("the engine failed", exc_info=self._failure)
        self._state = _State.DEAD
        self._thread.join()
        for stream in self._streams.values():
            stream.put(self._dead())
        self._streams.clear()
        for future in self._calls:
            if not future.done():
                future.set_exception(self._dead())

    def _dead(self) -> EngineDeadError:
        if self._failure is None:
            return EngineDeadError("the engine was shut down; make a new one")
        error = EngineDeadError(f"the engine failed and can't go on: {type(self._failure).__name__}: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _check_alive(self) -> None:
        if self._state in (_State.NEW, _State.LOADING):
            raise EngineMisuseError("the engine has not started; use `async with`, or await start() first")
        if self._state is _State.DEAD:
            raise self._dead()
        self._check_loop()

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise EngineMisuseError("an AsyncLLMEngine belongs to the event loop that started it; call it from that loop only")

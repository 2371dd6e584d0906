"""EngineThread: the thread that an LLMEngine belongs to, a queue of commands before it and a box of events behind it."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from pagefork.scheduler.params import CommonParams

from .admission import Prompt
from .config import EngineConfig
from .core import LLMEngine
from .outputs import RequestOutput
from .stream import Stream

T = TypeVar("T")
Event = RequestOutput | Exception

_EXIT_SECONDS = 30.0  # how long the end of the interpreter waits for the step, or the loading, under way


class EngineThread:
    """Loads an LLMEngine and steps it in a thread of its own, which sleeps while there is nothing to do.

    The event loop's thread calls the public methods. Each puts a command into the queue, which the thread obeys
    in order, between two steps. What begins with an underscore is the thread's alone, as is the engine; shared
    are the queue, the futures and, under its lock, the box of events. The box holds the newest event of each
    stream, so a slow loop costs outputs, not memory, and the loop is woken once each time it begins to fill.

    `ended` is the thread's last word: None after stop(), else the error that loading or stepping failed with.
    Whatever stream or call has no answer by then gets none.
    """

    def __init__(self, config: EngineConfig, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        """`wake` is called in the loop when take() has something."""
        self.ended: Future[BaseException | None] = Future()
        self._config = config
        self._loop = loop
        self._wake = wake
        self._queue: SimpleQueue[Callable[[LLMEngine], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._box: dict[Stream, Event] = {}
        self._streams: dict[str, Stream] = {}
        self._deadline: float | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="pagefork-engine", daemon=True)

    def start(self) -> None:
        """Begin to load. At the end of the interpreter the thread is stopped, if nobody did it before."""
        self._thread.start()
        atexit.register(self._exit)

    def add(self, stream: Stream, prompt: Prompt, params: CommonParams | None, priority: int) -> None:
        """Tokenise and queue a request; its events go to `stream`. No two live streams may have one id."""
        self._queue.put(lambda engine: self._add(engine, stream, prompt, params, priority))

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets the last output, unless it has ended."""
        self._queue.put(lambda engine: engine.abort_request(request_id))

    def discard(self, request_id: str) -> None:
        """End a request that nobody reads any more."""
        self._queue.put(lambda engine: self._discard(engine, request_id))

    def call(self, function: Callable[[LLMEngine], T]) -> Future[T]:
        """What `function` returns or raises, between two steps."""
        future: Future[T] = Future()
        self._queue.put(lambda engine: _answer(engine, function, future))
        return future

    def stop(self, seconds: float | None) -> None:
        """End the thread when all requests have, and after so many seconds abort those that have not."""
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        self._queue.put(lambda engine: self._stop(deadline))

    def take(self) -> dict[Stream, Event]:
        """The newest event of every stream that has any."""
        with self._lock:
            events, self._box = self._box, {}
        return events

    def join(self) -> None:
        """Wait for the thread, which is over once `ended` is set."""
        self._thread.join()
        atexit.unregister(self._exit)

    def _run(self) -> None:
        failure = None
        try:
            self._serve(LLMEngine(self._config))
        except BaseException as error:  # noqa: BLE001 - whatever it is, those who wait have to know
            traceback.clear_frames(error.__traceback__)  # they hold the model
            failure = error
        self.ended.set_result(failure)

    def _serve(self, engine: LLMEngine) -> None:
        while not self._abandoned:
            idle = not engine.has_unfinished_requests()
            self._obey(engine, wait=idle and self._deadline is None)
            if self._deadline is not None and (time.monotonic() >= self._deadline or not engine.has_unfinished_requests()):
                break
            self._publish(engine.step())
        for request_id in self._streams:
            engine.abort_request(request_id)
        self._publish(engine.step())

    def _obey(self, engine: LLMEngine, wait: bool) -> None:
        """The commands that are there; with `wait`, at least one."""
        for _ in range(max(self._queue.qsize(), wait)):
            self._queue.get()(engine)

    def _publish(self, outputs: list[RequestOutput]) -> None:
        events: dict[Stream, Event] = {self._streams[output.request_id]: output for output in outputs}
        for output in outputs:
            if output.finished:
                del self._streams[output.request_id]
        self._post(events)

    def _post(self, events: Mapping[Stream, Event]) -> None:
        with self._lock:
            wake = not self._box and bool(events)
            self._box.update(events)
        if wake:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop was closed: nobody is left to stop this thread
                self._abandoned = True

    def _add(self, engine: LLMEngine, stream: Stream, prompt: Prompt, params: CommonParams | None, priority: int) -> None:
        try:
            given = engine.default_params() if params is None else params
            request = engine.prepare(stream.request_id, prompt, given, priority)
        except Exception as error:  # noqa: BLE001 - a request that can't be prepared is nobody else's failure
            self._post({stream: error})
            return
        engine.queue(request, prompt if isinstance(prompt, str) else None)
        self._streams[stream.request_id] = stream

    def _discard(self, engine: LLMEngine, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            engine.discard([request_id])

    def _stop(self, deadline: float) -> None:
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def _exit(self) -> None:
        self.stop(0)
        self._thread.join(_EXIT_SECONDS)


def _answer(engine: LLMEngine, function: Callable[[LLMEngine], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(engine))
    except Exception as error:  # noqa: BLE001 - it is the caller's
        future.set_exception(error)

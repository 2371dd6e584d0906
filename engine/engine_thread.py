"""EngineThread: the thread that an LLMEngine belongs to, a queue of commands before it and a box of events behind it."""

from __future__ import annotations

import atexit
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pagefork.scheduler.params import CommonParams

from .config import EngineConfig
from .core import LLMEngine
from .limits import check_room
from .outputs import RequestOutput
from .prompts import Prompt
from .value_functions import MakesValueFunction

T = TypeVar("T")


class Queued(NamedTuple):
    """A request was accepted; so many wait before it."""

    ahead: int


class Moment(NamedTuple):
    """The engine after a step, or when it had nothing to do. `at`: seconds of time.monotonic()."""

    at: float
    running: int = 0
    waiting: int = 0
    free_blocks: int = 0

    @property
    def busy(self) -> bool:
        return self.running + self.waiting > 0


class Receiver(Protocol):
    """Whom events are for; told from others by identity."""

    @property
    def request_id(self) -> str: ...


Event = RequestOutput | Exception | Queued
_Receiver = TypeVar("_Receiver", bound=Receiver)

_EXIT_SECONDS = 30.0  # how long the end of the interpreter waits for the step, or the loading, under way


class EngineThread(Generic[_Receiver]):
    """Loads an LLMEngine and steps it in a thread of its own, which sleeps while there is nothing to do.

    One other thread, the caller's, calls the public methods. Each puts a command into the queue, which the thread obeys
    in order, between two steps. What begins with an underscore is the thread's alone, as is the engine; shared
    are the queue, the futures, `moment` and, under its lock, the box of events. The box holds the newest event of each
    receiver, so a slow caller costs outputs, not memory, and it is woken once each time the box begins to fill.

    `ended` is the thread's last word: None after stop(), else the error that loading or stepping failed with.
    Whatever receiver or call has no answer by then gets none.
    """

    def __init__(
        self,
        config: EngineConfig,
        wake: Callable[[], object],
        value_functions: Mapping[str, MakesValueFunction] | None = None,
        *,
        announce: bool = False,
        strict: bool = False,
    ) -> None:
        """`wake` is called in the thread when take() has something; a RuntimeError of its says that nobody is left.

        announce: receivers get a Queued when their request was accepted, unless an output comes at once. strict: max_tokens
        that do not fit max_model_len are refused, not cut.
        """
        self.ended: Future[BaseException | None] = Future()
        self.moment = Moment(time.monotonic())
        self._config = config
        self._value_functions = value_functions
        self._wake = wake
        self._announce, self._strict = announce, strict
        self._queue: SimpleQueue[Callable[[LLMEngine], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._box: dict[_Receiver, Event] = {}
        self._receivers: dict[str, _Receiver] = {}
        self._deadline: float | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="pagefork-engine", daemon=True)

    def start(self) -> None:
        """Begin to load. At the end of the interpreter the thread is stopped, if nobody did it before."""
        self._thread.start()
        atexit.register(self._exit)

    def add(
        self,
        receiver: _Receiver,
        prompt: Prompt,
        params: CommonParams | None,
        priority: int = 0,
        **fields: Any,
    ) -> None:
        """Tokenise and queue a request; its events go to `receiver`. No two live receivers may have one id.

        fields: of the Request, which the engine has no argument for.
        """
        self._queue.put(lambda engine: self._add(engine, receiver, prompt, params, priority, fields))

    def abort(self, request_id: str) -> None:
        """End a request; its receiver gets the last output, unless it has ended."""
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

    def take(self) -> dict[_Receiver, Event]:
        """The newest event of every receiver that has any."""
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
            self._serve(LLMEngine(self._config, self._value_functions))
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
            self._observe(engine)
        for request_id in self._receivers:
            engine.abort_request(request_id)
        self._publish(engine.step())

    def _obey(self, engine: LLMEngine, wait: bool) -> None:
        """The commands that are there; with `wait`, at least one."""
        for _ in range(max(self._queue.qsize(), wait)):
            self._queue.get()(engine)

    def _publish(self, outputs: list[RequestOutput]) -> None:
        events: dict[_Receiver, Event] = {self._receivers[output.request_id]: output for output in outputs}
        for output in outputs:
            if output.finished:
                del self._receivers[output.request_id]
        self._post(events)

    def _post(self, events: Mapping[_Receiver, Event]) -> None:
        with self._lock:
            wake = not self._box and bool(events)
            self._box.update(events)
        if wake:
            try:
                self._wake()
            except RuntimeError:  # nobody is left to stop this thread
                self._abandoned = True

    def _observe(self, engine: LLMEngine) -> None:
        self.moment = Moment(time.monotonic(), *engine.occupancy())

    def _add(
        self,
        engine: LLMEngine,
        receiver: _Receiver,
        prompt: Prompt,
        params: CommonParams | None,
        priority: int,
        fields: dict[str, Any],
    ) -> None:
        try:
            given = engine.default_params() if params is None else params
            request = replace(engine.prepare(receiver.request_id, prompt, given, priority), **fields)
            if self._strict and params is not None:
                check_room(len(request.prompt), params, engine.max_model_len)
        except Exception as error:  # noqa: BLE001 - a request that can't be prepared is nobody else's failure
            self._post({receiver: error})
            return
        if not self.moment.busy:  # it has been idle; what passes until the next step counts from here
            self.moment = self.moment._replace(at=time.monotonic(), waiting=1)
        engine.queue(request, prompt if isinstance(prompt, str) else None)
        self._receivers[receiver.request_id] = receiver
        if self._announce:
            self._post({receiver: Queued(engine.occupancy()[1] - 1)})

    def _discard(self, engine: LLMEngine, request_id: str) -> None:
        if self._receivers.pop(request_id, None) is not None:
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

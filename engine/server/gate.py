"""The engine as the service sees it: prompts are tokenised in a few threads, and computed in the engine's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

from pagefork.config import EngineConfig
from pagefork.core import LLMEngine
from pagefork.engine_thread import EngineThread, Event, Moment
from pagefork.outputs import EngineStats
from pagefork.prompts import PromptReader, TokenizedText
from pagefork.scheduler.params import CommonParams
from pagefork.value_functions import MakesValueFunction

from .logs import log
from .seam import Ticket

_TOKENIZERS = 2  # threads; the service bounds what waits for them, for it reserves the tokens of a request before it adds it


class Loaded(NamedTuple):
    """What there is to know of an engine once it is loaded."""

    prompts: PromptReader
    facts: dict[str, Any]  # of LLMEngine.info()


class _Reading(NamedTuple):
    """A text that is being tokenised, and what to add it with."""

    ticket: Ticket
    params: CommonParams | None
    fields: dict[str, Any]
    ids: Future[TokenizedText]


class EngineGate:
    """The Gate of seam.py over an EngineThread. All methods belong to one thread, the service's.

    `loaded` and `ended` are what the engine's thread has to say of its beginning and of its end.
    """

    def __init__(
        self,
        config: EngineConfig,
        wake: Callable[[], object],
        value_functions: Mapping[str, MakesValueFunction] | None = None,
        *,
        log_prompts: bool = False,
    ) -> None:
        """`wake` is called in other threads when take() has something, or one of the futures has."""
        self._wake = wake
        self._log_prompts = log_prompts
        self._thread: EngineThread[Ticket] = EngineThread(config, wake, value_functions, announce=True, strict=True)
        self._pool = ThreadPoolExecutor(_TOKENIZERS, "pagefork-tokenizer")
        self._reading: dict[str, _Reading] = {}
        self._aborted: set[str] = set()  # of those that are being tokenised
        self._read: SimpleQueue[_Reading] = SimpleQueue()
        self._replies: SimpleQueue[tuple[Callable[[EngineStats], None], Future[EngineStats]]] = SimpleQueue()
        self.ended = self._thread.ended
        self.loaded: Future[Loaded] = self._thread.call(lambda engine: Loaded(engine.prompts, engine.info()))
        for future in (self.loaded, self.ended):
            future.add_done_callback(lambda _: wake())

    @property
    def moment(self) -> Moment:
        """The engine after its last step."""
        return self._thread.moment

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def add(self, ticket: Ticket, prompt: str | list[int], params: CommonParams | None, **fields: Any) -> None:
        """Tokenise, check and queue a request, once the engine is loaded. fields: as of EngineThread.add."""
        if self._log_prompts:
            log("request.prompt", request=ticket.request_id, prompt=prompt)
        if not isinstance(prompt, str):
            self._thread.add(ticket, prompt, params, **fields)
            return
        ids: Future[TokenizedText] = Future()
        try:
            ids = self._pool.submit(self.loaded.result().prompts.tokenize, prompt)
        except RuntimeError as error:  # the system allows no more threads
            ids.set_exception(error)
        reading = self._reading[ticket.request_id] = _Reading(ticket, params, fields, ids)
        ids.add_done_callback(lambda _: self._tell(reading))

    def _tell(self, reading: _Reading) -> None:
        """In the tokenising thread, or in this one for what is over already."""
        self._read.put(reading)
        self._wake()

    def abort(self, ticket: Ticket) -> None:
        """End a request; its last output comes, unless it has come."""
        if ticket.request_id in self._reading:
            self._aborted.add(ticket.request_id)
        else:
            self._thread.abort(ticket.request_id)

    def discard(self, ticket: Ticket) -> None:
        """End a request of which no event is wanted any more."""
        if (reading := self._reading.pop(ticket.request_id, None)) is not None:
            self._aborted.discard(ticket.request_id)
            reading.ids.cancel()
        else:
            self._thread.discard(ticket.request_id)

    def stats(self, reply: Callable[[EngineStats], None]) -> None:
        """Call `reply` in take(), once the engine has answered between two steps."""

        def answered(future: Future[EngineStats]) -> None:
            self._replies.put((reply, future))
            self._wake()

        self._thread.call(LLMEngine.stats).add_done_callback(answered)

    def take(self) -> dict[Ticket, Event]:
        """The newest event of every ticket that has any; calls what waits for stats() before it returns."""
        events = self._thread.take()
        while not self._read.empty():
            reading = self._read.get()
            name = reading.ticket.request_id
            if self._reading.get(name) is not reading:  # discarded
                continue
            del self._reading[name]
            if (error := reading.ids.exception()) is not None:
                self._aborted.discard(name)
                events[reading.ticket] = error if isinstance(error, Exception) else RuntimeError(str(error))
                continue
            self._thread.add(reading.ticket, reading.ids.result(), reading.params, **reading.fields)
            if name in self._aborted:
                self._aborted.remove(name)
                self._thread.abort(name)
        while not self._replies.empty():
            reply, future = self._replies.get()
            if future.exception() is None:
                reply(future.result())
        return events

    def stop(self, seconds: float) -> bool:
        """End the engine's thread; whether it did so within these seconds."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._thread.stop(0)
        try:
            self.ended.result(seconds)
        except TimeoutError:
            return False
        self._thread.join()
        return True

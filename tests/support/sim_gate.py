"""The service's engine in a simulation: EngineThread's commands and box over an OracleEngine, stepped by whoever drives it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from pagefork.engine_thread import EngineThread, Event, Moment, Queued
from pagefork.outputs import EngineStats, RequestOutput
from pagefork.scheduler.params import CommonParams
from pagefork.server.seam import Ticket
from support.oracle_engine import OracleEngine


class _Stepped(EngineThread[Ticket]):
    """Without its thread."""

    def __init__(self, engine: OracleEngine) -> None:
        super().__init__(engine.config, wake=lambda: None, announce=True)
        self.engine = engine

    def step(self) -> None:
        self._obey(self.engine, wait=False)
        if self.engine.has_unfinished_requests():
            self._publish(self.engine.step())
        self._observe(self.engine)


class SimGate:
    """A Gate. A text is tokenised some moments after it came; stats are answered some moments after they were asked for."""

    def __init__(self, clock: Callable[[], float], rng: random.Random) -> None:
        self._clock, self._rng = clock, rng
        self.engine = OracleEngine()
        self._thread = _Stepped(self.engine)
        self._at = clock()
        self._later: list[Callable[[], None]] = []  # what another thread would do in its own time
        self._gone: set[str] = set()
        self.added: dict[str, tuple[str | list[int], CommonParams | None]] = {}

    @property
    def moment(self) -> Moment:
        return self._thread.moment._replace(at=self._at)

    def add(self, ticket: Ticket, prompt: str | list[int], params: CommonParams | None, **fields: Any) -> None:
        assert ticket.request_id not in self.added, "two requests of one id"
        self.added[ticket.request_id] = prompt, params
        if isinstance(prompt, str):
            self._later.append(lambda: self._add(ticket, prompt, params, fields))
        else:
            self._add(ticket, prompt, params, fields)

    def _add(self, ticket: Ticket, prompt: str | list[int], params: CommonParams | None, fields: dict[str, Any]) -> None:
        if ticket.request_id not in self._gone:
            self._thread.add(ticket, prompt, params, **fields)

    def abort(self, ticket: Ticket) -> None:
        self._either(lambda: self._thread.abort(ticket.request_id))

    def discard(self, ticket: Ticket) -> None:
        self._gone.add(ticket.request_id)
        self._thread.discard(ticket.request_id)

    def _either(self, act: Callable[[], None]) -> None:
        """Commands overtake no prompt that is being tokenised."""
        if self._later:
            self._later.append(act)
        else:
            act()

    def stats(self, reply: Callable[[EngineStats], None]) -> None:
        self._later.append(lambda: reply(self.engine.stats()))

    @property
    def busy(self) -> bool:
        """Whether step() has something to do."""
        return bool(self._later) or self._thread._queue.qsize() > 0 or self.engine.has_unfinished_requests()

    def step(self) -> None:
        """What other threads do until the engine has made a step."""
        while self._later and self._rng.random() < 0.7:
            self._later.pop(0)()
        self._thread.step()
        self._at = self._clock()
        self.engine.check()

    def take(self) -> dict[Ticket, Event]:
        """The box, with this clock's times in the outputs."""
        events = self._thread.take()
        for event in events.values():
            if isinstance(event, RequestOutput):
                at, first = self._clock(), None if event.metrics.first_token_time is None else self._clock()
                event.metrics = msgspec.structs.replace(event.metrics, arrival_time=at, first_token_time=first)
            else:
                assert isinstance(event, Queued | Exception)
        return events

"""The client's state machine on a bench: a clock that is set by hand, and messages that are handed in and taken out."""

from __future__ import annotations

import itertools
from concurrent.futures import Future

from pagefork import ServiceError
from pagefork.client.prompts import submission
from pagefork.client.request import Arrived, Event
from pagefork.client.state import Ask, ClientState
from pagefork.wire import (
    ClientMessage,
    Delta,
    Deltas,
    EngineMessage,
    Final,
    Finished,
    Hello,
    Pong,
    Welcome,
    decode_from_client,
    encode,
)


class Clock:
    """Seconds that pass when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Reader:
    """Keeps events, and asserts that nothing follows a terminal one."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        assert self.end is None, f"{event} after the end"
        self.events.append(event)

    @property
    def end(self) -> Arrived | ServiceError | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Arrived | ServiceError) else None

    @property
    def error(self) -> ServiceError:
        assert isinstance(self.end, ServiceError)
        return self.end

    def tokens(self) -> list[int]:
        deltas = [token for event in self.events if isinstance(event, Delta) for token in event.tokens]
        return deltas + (self.end.finished.outputs[0].tokens if isinstance(self.end, Arrived) else [])


class Bench:
    """A state machine on the bench: messages are handed in and taken out by hand."""

    def __init__(self, **arguments: float) -> None:
        self.clock = Clock()
        self.state = ClientState(clock=self.clock, **arguments)  # type: ignore[arg-type]
        self.readers: dict[str, Reader] = {}
        self.sent: list[ClientMessage] = []
        self._connection: int | None = None

    def turn(self, seconds: float = 0.0) -> list[ClientMessage]:
        """Let time pass; what is sent then."""
        until = self.clock.now + seconds
        for turn in itertools.count():
            assert turn < 10_000, "there is always something due"
            wait = self.state.tick()
            if self.state.connection != self._connection:
                self._connection = self.state.connection
                if self._connection is not None:
                    self.state.opened("token")
            for sink, event in self.state.take_events():
                sink.put(event)
            if wait > 0 and self.clock.now >= until:
                break
            self.clock.now = min(until, self.clock.now + max(wait, 1e-3))
        self.sent = [decode_from_client(frames)[0] for frames in self.state.take_messages()]
        return self.sent

    def hear(self, *messages: EngineMessage) -> list[ClientMessage]:
        for message in messages:
            self.state.receive(encode(message))
        return self.turn()

    def welcome(self, boot_id: str = "boot", resumed: bool = False) -> list[ClientMessage]:
        assert isinstance(self.turn()[0], Hello)
        return self.hear(welcome(boot_id, resumed))

    def submit(self, rid: str, deadline: float | None = None) -> Reader:
        made = submission(rid, "text", None, priority=0, deadline=deadline, credit=8, stream=True)
        reader = self.readers[rid] = Reader()
        self.state.submit(rid, made.frames, reader, made.credit, made.deadline)
        self.turn()
        return reader


def pong(t: int = 1, boot_id: str = "boot") -> Pong:
    return Pong(t=t, boot_id=boot_id, state="running", last_step_age_ms=0, running=0, waiting=0, free_blocks=0)


def welcome(boot_id: str = "boot", resumed: bool = False) -> Welcome:
    return Welcome(
        proto=1,
        boot_id=boot_id,
        session=b"0123456789abcdef",
        resumed=resumed,
        model="m",
        vocab_size=10,
        max_model_len=100,
        limits={},
        ping_ms=5000,
        lease_ms=15000,
        grace_ms=5000,
    )


def up(**arguments: float) -> Bench:
    bench = Bench(**arguments)
    bench.state.ask(Ask(None, Future()))
    bench.welcome()
    return bench


def tokens(rid: str, start: int, *ids: int) -> Deltas:
    text = "".join(map(chr, (97 + token for token in ids)))
    return Deltas(deltas=[Delta(rid=rid, index=0, start=start, tokens=list(ids), text_from=start, text=text)])


def finished(rid: str, start: int) -> Finished:
    return Finished(rid=rid, outputs=[Final(index=0, start=start, text_from=start, finish_reason="length")])

"""The state machine of `pagefork.Client` in the hands of a simulation; checked by the same letter as a raw client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pagefork import wire
from pagefork.client.request import Arrived, Event
from pagefork.client.state import ClientState, Phase
from pagefork.scheduler.errors import ServiceError
from pagefork.scheduler.params import CommonParams
from pagefork.wire import Accepted, Code, Submit
from support.raw_client import Asked, Link, RawClient


class _Sink:
    """One request's reader: one Accepted at most, parts that follow each other, one terminal."""

    def __init__(self, client: StateClient, asked: Asked) -> None:
        self._client, self._asked = client, asked

    def put(self, event: Event) -> None:
        asked, rid = self._asked, self._asked.submit.rid
        assert not asked.over, f"{rid}: {event} after the end"
        match event:
            case Accepted():
                assert not asked.accepted, f"{rid} is accepted twice"
                asked.accepted = True
            case wire.Delta():
                grown = asked.output(event.index)
                assert (event.start, event.text_from) == (len(grown.tokens), len(grown.text)) or not event.text
                assert event.start + len(event.tokens) <= asked.upto
                grown.extend(rid, event)
            case Arrived():
                for final in event.finished.outputs:
                    asked.output(final.index).extend(rid, final)
                asked.finished = event.finished
            case ServiceError():
                assert not (event.retry_safe and any(grown.tokens for grown in asked.outputs)), (
                    f"{rid}: safe to ask again, after tokens"
                )
                if event.code == Code.ENGINE_LOST:
                    asked.lost = True
                    self._client.lost_sessions += 1
                elif event.code == Code.CANCELLED:
                    asked.lost = True
                    assert asked.aborted or self._client.closed, f"{rid}: {event}"
                else:
                    asked.refused = event.code


class StateClient(RawClient):
    """`link` follows the connection that the state machine wants."""

    def __init__(self, name: str, token: str | None, clock: Callable[[], float]) -> None:
        super().__init__(name, token)
        self.state = ClientState(name=name, clock=clock)
        self._connection: int | None = None
        self.closed = False

    @property
    def wants_link(self) -> bool:
        return self.state.connection is not None and self.state.connection != self._connection

    def connect(self, link: Link, now: float) -> None:
        self.link, self._connection = link, self.state.connection
        self.state.opened(self.token)
        self.pump()

    def cut(self) -> None:
        """The connection is gone, and the socket tells."""
        self.state.broken("the connection was cut")
        self.pump()

    def pump(self) -> None:
        """What the state machine has to say, to both sides."""
        for frames in self.state.take_messages():
            if self.link is not None and self.state.connection == self._connection:
                self.sent.append(frames)
                self.link.inward.append(frames)
        for sink, event in self.state.take_events():
            sink.put(event)
        self.session, self.welcomed = self.state.session, self.state.phase is Phase.UP

    def submit(self, rid: str, prompt: str | list[int], params: CommonParams, credit: int, **fields: Any) -> None:
        text = {"text": prompt} if isinstance(prompt, str) else {}
        message = Submit(rid=rid, params=wire.encode_params(params), credit=credit, **text, **fields)
        blob = None if isinstance(prompt, str) else wire.encode_tokens(prompt)
        asked = self.asked[rid] = Asked(message, blob, prompt, params, credit)
        asked.asks = 1
        self.state.submit(rid, wire.encode(message, blob), _Sink(self, asked), credit)
        self.pump()

    def credit(self, rid: str, upto: int) -> None:
        """As a reader gives it: when something has come."""
        if not self.asked[rid].accepted:
            return
        self.asked[rid].upto = max(self.asked[rid].upto, upto)
        self.state.credit(rid, upto)
        self.pump()

    def abort(self, rid: str) -> None:
        self.asked[rid].aborted = True
        self.state.abort(rid)
        self.pump()

    def bye(self) -> None:
        """Close it and begin anew."""
        self.closed = True
        self.state.close()
        self.pump()
        self.closed = False
        self.state = ClientState(name=self.name, clock=self.state._clock)
        self._connection = None
        self.session, self.welcomed = None, False

    def tick(self, now: float) -> None:
        self.state.tick()
        self.pump()

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        message, _ = wire.decode_from_engine(frames)
        if isinstance(message, wire.Error):
            self.refusals.append(message.code)
        self.state.receive(frames)
        self.pump()

"""A Service whose clock, engine and peers are moved by hand: what the simulation of it and its tests stand on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec

from pagefork import wire
from pagefork.engine_thread import Event, Moment, Queued
from pagefork.limits import Limits
from pagefork.outputs import CompletionOutput, EngineStats, Logprob, RequestMetrics, RequestOutput
from pagefork.scheduler.errors import PageforkError
from pagefork.scheduler.params import CommonParams
from pagefork.server.seam import Facts, Sent, Ticket, Timing
from pagefork.server.service import Service

FACTS = Facts(model="m", vocab_size=1000, max_model_len=512)
STATS = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 0))


class HandGate:
    """Remembers what it was asked. No engine is behind it."""

    def __init__(self) -> None:
        self.moment = Moment(0.0)
        self.added: list[tuple[Ticket, Any, CommonParams | None, dict[str, Any]]] = []
        self.aborted: list[Ticket] = []
        self.discarded: list[Ticket] = []
        self.asked: list[Callable[[EngineStats], None]] = []
        self.failure: Exception | None = None

    def add(self, ticket: Ticket, prompt: Any, params: CommonParams | None, **fields: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.added.append((ticket, prompt, params, fields))

    def abort(self, ticket: Ticket) -> None:
        self.aborted.append(ticket)

    def discard(self, ticket: Ticket) -> None:
        self.discarded.append(ticket)

    def stats(self, reply: Callable[[EngineStats], None]) -> None:
        self.asked.append(reply)


class Hand:
    """A Service, its gate and its peers. `state` says what sending to a peer comes to; OK where nothing is said."""

    def __init__(self, timing: Timing | None = None, token: str | None = None, **limits: int) -> None:
        self.now = 100.0
        self.gate = HandGate()
        self.state: dict[bytes, Sent] = {}
        self.inbox: dict[bytes, list[tuple[Any, bytes | None]]] = defaultdict(list)
        self.sizes: list[int] = []
        self.attempts: list[float] = []  # when something was to be sent
        self.logged: list[tuple[str, dict[str, object]]] = []
        self._random = 0
        self.service = Service(
            self.gate, self._send, FACTS, Limits(**limits), timing, token=token,
            clock=lambda: self.now, urandom=self._urandom, log=lambda event, /, **fields: self.logged.append((event, fields)),
        )  # fmt: skip

    def _urandom(self, size: int) -> bytes:
        self._random += 1
        return self._random.to_bytes(size, "big")

    def _send(self, peer: bytes, frames: list[bytes]) -> Sent:
        self.attempts.append(self.now)
        sent = self.state.get(peer, Sent.OK)
        if sent is Sent.OK:
            self.sizes.append(sum(map(len, frames)))
            self.inbox[peer].append(wire.decode_from_engine(frames))
        return sent

    def say(self, peer: bytes, message: wire.ClientMessage, blob: bytes | None = None, principal: str | None = "me") -> list[Any]:
        """Send a message; what was answered at once."""
        self.service.receive(peer, wire.encode(message, blob), principal)
        return self.take(peer)

    def take(self, peer: bytes = b"p") -> list[Any]:
        """The messages that came since the last time."""
        return [message for message, _ in self.inbox.pop(peer, [])]

    def hello(self, peer: bytes = b"p", **fields: Any) -> wire.Welcome:
        [welcome] = self.say(peer, wire.Hello(**fields))
        assert isinstance(welcome, wire.Welcome)
        return welcome

    def submit(self, rid: str = "r", peer: bytes = b"p", prompt: Any = (1, 2, 3), params: Any = None, **fields: Any) -> list[Any]:
        """Ask for a completion of token ids, or of a text."""
        text, blob = (prompt, None) if isinstance(prompt, str) else (None, wire.encode_tokens(prompt))
        message = wire.Submit(rid=rid, text=text, params=wire.encode_params(params), **{"credit": 1 << 20, **fields})
        return self.say(peer, message, blob)

    def open(self, rid: str = "r", peer: bytes = b"p", **fields: Any) -> Ticket:
        """An accepted request."""
        self.submit(rid, peer, **fields)
        ticket = self.gate.added[-1][0]
        self.deliver(ticket, Queued(0))
        assert isinstance(self.take(peer)[-1], wire.Accepted)
        return ticket

    def deliver(self, ticket: Ticket, event: Event) -> None:
        self.service.deliver({ticket: event})

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and tick as often as the service wants."""
        until = self.now + seconds
        while (wait := self.service.tick()) < until - self.now:
            self.now += max(wait, 1e-3)
        self.now = until
        self.service.tick()

    def stats(self) -> wire.ServiceStats:
        """The service's own numbers, as a client of its own gets them."""
        self.service.receive(b"stats", wire.encode(wire.Hello()), "stats")
        self.service.receive(b"stats", wire.encode(wire.Stats()), "stats")
        self.gate.asked.pop()(STATS)
        reply = self.take(b"stats")[-1]
        self.service.receive(b"stats", wire.encode(wire.Bye()), "stats")
        assert isinstance(reply, wire.StatsReply)
        return reply.service


def output(
    ticket: Ticket,
    tokens: int | list[int],
    *,
    finish: str | None = None,
    error: PageforkError | None = None,
    logprobs: bool = False,
    prompt: list[int] | None = None,
    **fields: Any,
) -> RequestOutput:
    """A request's output with so many tokens 0, 1, 2, ... in each completion, whose texts are `<0><1>...`."""
    counts = [tokens] if isinstance(tokens, int) else tokens
    return RequestOutput(
        request_id=ticket.request_id,
        prompt=None,
        prompt_token_ids=prompt if prompt is not None else [1, 2, 3],
        outputs=[
            CompletionOutput(
                index=index,
                text="".join(f"<{token}>" for token in range(count)),
                token_ids=list(range(count)),
                logprobs=[{token: Logprob(-1.0, 1, f"<{token}>")} for token in range(count)] if logprobs else None,
                finish_reason=finish,
            )
            for index, count in enumerate(counts)
        ],
        finished=finish is not None,
        metrics=RequestMetrics(arrival_time=0.0),
        error=error,
        **fields,
    )


def bare(message: Any) -> Any:
    """A message as plain values, to compare."""
    return msgspec.to_builtins(message)

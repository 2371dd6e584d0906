"""A client of the service by the letter of the protocol: it does no input and output, and believes nothing that it is told."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pagefork import wire
from pagefork.outputs import RequestOutput
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.server.seam import Timing
from pagefork.wire import (
    Abort,
    Accepted,
    Attach,
    Bye,
    Code,
    Credit,
    Deltas,
    Finished,
    GoAway,
    Have,
    Hello,
    Ping,
    Pong,
    Submit,
    Welcome,
)
from support.oracle_engine import alone

Frames = list[bytes]
REFUSALS = {Code.INVALID_ARGUMENT, Code.TOO_LARGE, Code.QUEUE_FULL, Code.DRAINING, Code.DUPLICATE_MISMATCH}


@dataclass
class Link:
    """One connection: what is on its way in both directions."""

    peer: bytes
    capacity: int
    inward: deque[Frames] = field(default_factory=deque)  # to the service
    outward: deque[Frames] = field(default_factory=deque)  # to the client
    there: bool = True  # as the service's socket sees it
    reads: bool = True  # whether the client takes anything from it


@dataclass
class Grown:
    """One output as far as it came."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)

    def extend(self, rid: str, part: wire.Delta | wire.Final) -> None:
        """No gap, and what comes again is the same."""
        assert part.start <= len(self.tokens), f"{rid}: tokens from {part.start}, but only {len(self.tokens)} came before"
        assert part.text_from <= len(self.text), f"{rid}: text from {part.text_from}, but only {len(self.text)} characters came"
        again = self.tokens[part.start : part.start + len(part.tokens)]
        assert part.tokens[: len(again)] == again, f"{rid}: tokens that came before come again otherwise"
        self.tokens[part.start :] = [*part.tokens, *self.tokens[part.start + len(part.tokens) :]]
        old = self.text[part.text_from : part.text_from + len(part.text)]
        if isinstance(part, wire.Delta):
            assert part.text[: len(old)] == old, f"{rid}: text that came before comes again otherwise"
            self.text = self.text[: part.text_from] + part.text + self.text[part.text_from + len(part.text) :]
        else:
            self.text = self.text[: part.text_from] + part.text  # the end may take back what a stop text is part of
        if part.logprobs is not None:
            assert len(part.logprobs) == len(part.tokens), f"{rid}: {len(part.logprobs)} maps for {len(part.tokens)} tokens"
            self.logprobs[part.start : part.start + len(part.logprobs)] = part.logprobs


@dataclass
class Asked:
    """A request of a client's and what came of it."""

    submit: Submit
    blob: bytes | None
    prompt: str | list[int]
    params: CommonParams
    upto: int  # the most credit that was given
    asks: int = 0  # Submits and Attaches that were sent: how many Finisheds may come
    accepted: bool = False
    aborted: bool = False
    lost: bool = False  # with its session or engine
    refused: str | None = None
    outputs: list[Grown] = field(default_factory=list)
    finished: Finished | None = None
    finishes: int = 0
    ended_in: bytes | None = None  # the session; a Submit that comes again in a later one is another request
    ended_at: float = -math.inf  # and so is one that comes when the service has forgotten this one

    @property
    def over(self) -> bool:
        return self.finished is not None or self.refused is not None or self.lost

    def output(self, index: int) -> Grown:
        while len(self.outputs) <= index:
            self.outputs.append(Grown())
        return self.outputs[index]

    def have(self) -> list[Have]:
        return [Have(len(grown.tokens), len(grown.text)) for grown in self.outputs]


class RawClient:
    """`link` is its connection, which a driver gives and takes; `now` comes with every call that needs it."""

    def __init__(self, name: str, token: str | None) -> None:
        self.name = name
        self.token = token
        self.link: Link | None = None
        self.asked: dict[str, Asked] = {}
        self.session: bytes | None = None
        self.boot_id: str | None = None
        self.welcomed = False
        self.leaving = False  # told to go away
        self.lost_sessions = 0
        self.refusals: list[str] = []
        self.sent: deque[Frames] = deque(maxlen=30)  # to be sent again by whoever wants to confuse the service
        self._ping_at = 0.0
        self._heard_at = 0.0

    @property
    def wants_link(self) -> bool:
        """Whether its connection is of no use any more."""
        return self.leaving

    def connect(self, link: Link, now: float) -> None:
        self.link, self.welcomed, self.leaving = link, False, False
        self._heard_at, self._ping_at = now, now + 5.0
        self.send(Hello(client=self.name, token=self.token, session=self.session))

    def send(self, message: wire.ClientMessage, blob: bytes | None = None) -> None:
        if self.link is not None:
            frames = wire.encode(message, blob)
            self.sent.append(frames)
            self.link.inward.append(frames)

    def submit(self, rid: str, prompt: str | list[int], params: CommonParams, credit: int, **fields: Any) -> None:
        text = {"text": prompt} if isinstance(prompt, str) else {}
        message = Submit(rid=rid, params=wire.encode_params(params), credit=credit, **text, **fields)
        blob = None if isinstance(prompt, str) else wire.encode_tokens(prompt)
        self.asked[rid] = Asked(message, blob, prompt, params, credit)
        if self.welcomed:
            self._ask(self.asked[rid])

    def _ask(self, asked: Asked) -> None:
        """Submit it, or go on with it."""
        asked.asks += 1
        if asked.accepted:
            self.send(Attach(rid=asked.submit.rid, have=asked.have(), credit=asked.upto))
        else:
            self.send(asked.submit, asked.blob)  # the same bytes: else it would be another request
            if asked.upto > asked.submit.credit:
                self.send(Credit(rid=asked.submit.rid, upto=asked.upto))

    def credit(self, rid: str, upto: int) -> None:
        asked = self.asked[rid]
        asked.upto = max(asked.upto, upto)
        if self.welcomed:
            self.send(Credit(rid=rid, upto=upto))

    def abort(self, rid: str) -> None:
        self.asked[rid].aborted = True
        if self.welcomed:
            self.send(Abort(rid=rid))

    def bye(self) -> None:
        self.send(Bye())
        for asked in self.asked.values():
            asked.lost |= not asked.over
        self.session, self.welcomed, self.leaving = None, False, True

    def tick(self, now: float) -> None:
        """Ping; take the connection for dead when nothing is heard."""
        if self.link is not None and now >= self._ping_at:
            self._ping_at = now + 5.0
            if now - self._heard_at > 20.0:
                self.leaving = True
            self.send(Ping(t=int(now * 1000)))

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        """What the service says."""
        self._heard_at = now
        message, blob = wire.decode_from_engine(frames)
        match message:
            case Welcome():
                self._welcome(message)
            case Accepted():
                self.asked[message.rid].accepted = True
            case Deltas():
                for delta in message.deltas:
                    self._delta(delta)
            case Finished():
                self._finished(message, blob)
            case GoAway():
                self.leaving = True
            case wire.Error():
                self._refused(message)
            case Pong() | wire.StatsReply():
                pass

    def _welcome(self, message: Welcome) -> None:
        assert len(message.session) == 16
        same = message.resumed and message.session == self.session and message.boot_id == self.boot_id
        assert same or not message.resumed
        if not same and self.session is not None:
            self.lost_sessions += 1
            for asked in self.asked.values():
                asked.lost |= asked.asks > 0 and not asked.over
        self.session, self.boot_id, self.welcomed = message.session, message.boot_id, True
        for asked in self.asked.values():
            if not asked.over:
                self._ask(asked)
                if asked.aborted:
                    self.send(Abort(rid=asked.submit.rid))

    def _delta(self, delta: wire.Delta) -> None:
        asked = self.asked[delta.rid]
        assert asked.accepted, f"{delta.rid}: tokens of a request that was not accepted"
        assert asked.submit.stream, f"{delta.rid}: a Delta, and it is not streamed"
        assert asked.finishes < asked.asks, f"{delta.rid}: a Delta after the terminal"
        assert delta.tokens or delta.text, f"{delta.rid}: a Delta of nothing"
        assert delta.start + len(delta.tokens) <= asked.upto, f"{delta.rid}: {delta} is above the credit of {asked.upto}"
        asked.output(delta.index).extend(delta.rid, delta)

    def _finished(self, message: Finished, blob: bytes | None) -> None:
        asked = self.asked[message.rid]
        assert asked.accepted or message.error is not None, f"{message.rid}: the end of a request that was not accepted"
        asked.finishes += 1
        assert asked.finishes <= asked.asks, f"{message.rid}: {asked.finishes} terminals for {asked.asks} asks"
        for final in message.outputs:
            grown = asked.output(final.index)
            assert final.start <= len(grown.tokens)
            grown.extend(message.rid, final)
        remembered = asked.ended_in == self.session and self._heard_at < asked.ended_at + Timing().keep / 2  # messages may wait
        if asked.finished is not None and remembered:
            # One that came before the service knew what this client has says nothing of outputs.
            same = asked.finished.error == message.error
            same = same and (asked.finished.usage == message.usage or not asked.finished.outputs or not message.outputs)
            assert same, f"{message.rid} ended as {asked.finished}, and then as {message}"
        if isinstance(asked.prompt, str) and blob is not None:
            assert wire.decode_tokens(blob) == alone(asked.prompt, asked.params).prompt_token_ids
        asked.finished, asked.ended_in, asked.ended_at = message, self.session, self._heard_at

    def _refused(self, message: wire.Error) -> None:
        self.refusals.append(message.code)
        if message.rid is not None and message.rid in self.asked:
            asked = self.asked[message.rid]
            if asked.over or (asked.accepted and message.code == Code.DUPLICATE_MISMATCH):
                return
            if asked.accepted:  # an Attach that came too late: the service knows it no more
                asked.lost = True
            else:
                asked.refused = message.code
        elif message.code == Code.UNAUTHENTICATED:
            self.leaving = True

    def check(self, rid: str) -> None:
        """What came is what the request gets that runs alone, or as much of it as came."""
        asked = self.asked[rid]
        if asked.refused is not None:
            return
        whole = asked.finished is not None and asked.finished.error is None
        if not whole and not any(grown.tokens for grown in asked.outputs):
            return
        expected = alone(asked.prompt, asked.params)
        if (isinstance(asked.params, SamplingParams) and asked.params.best_of is None) or whole:
            for grown, completion in zip(asked.outputs, expected.outputs, strict=whole):
                _check_part(rid, grown, completion.token_ids)
        if not whole:
            return
        assert asked.finished is not None
        _check_whole(asked, expected)


def _check_part(rid: str, grown: Grown, tokens: list[int]) -> None:
    assert grown.tokens == tokens[: len(grown.tokens)], f"{rid} got {grown.tokens}; alone it gets {tokens}"


def _check_whole(asked: Asked, expected: RequestOutput) -> None:
    rid, finished = asked.submit.rid, asked.finished
    assert finished is not None
    assert finished.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert finished.usage.completion_tokens == sum(len(grown.tokens) for grown in asked.outputs), f"{rid}: delivered is not usage"
    assert finished.prompt_logprobs == expected.prompt_logprobs
    for grown, final, completion in zip(asked.outputs, finished.outputs, expected.outputs, strict=True):
        assert grown.tokens == completion.token_ids, f"{rid} got {grown.tokens}; alone it gets {completion.token_ids}"
        assert grown.text == completion.text, f"{rid} got {grown.text!r}; alone it gets {completion.text!r}"
        assert (final.finish_reason, final.stop_reason) == (completion.finish_reason, completion.stop_reason)
        assert math.isclose(final.cumulative_logprob, completion.cumulative_logprob, rel_tol=1e-6, abs_tol=1e-6)
        assert final.score == completion.score
        assert (grown.logprobs or None) == (completion.logprobs or None)

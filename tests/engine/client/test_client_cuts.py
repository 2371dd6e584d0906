"""The client's state machine against a small engine, while connections break and engines are replaced."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.client_bench import Bench, finished, pong, tokens, up, welcome

from pagefork.client.request import Arrived
from pagefork.wire import (
    Accepted,
    Attach,
    ClientMessage,
    Code,
    Credit,
    EngineMessage,
    Error,
    Hello,
    Ping,
    Submit,
    encode,
)


class Engine:
    """The other side, as docs/protocol.md has it: a tenth as long as the real one, for one session at a time."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.boot_id = "boot"
        self.session = False
        self.welcomed = False
        self.asked: dict[str, int] = {}  # rid: tokens of its output
        self.sent: dict[str, int] = {}
        self.upto: dict[str, int] = {}

    def restart(self) -> None:
        self.__init__(self.chance)  # type: ignore[misc]
        self.boot_id = f"boot{self.chance.random()}"

    def cut(self) -> None:
        self.welcomed = False
        self.sent.clear()

    def obey(self, message: ClientMessage) -> list[EngineMessage]:
        if isinstance(message, Hello):
            resumed = message.session is not None and self.session
            if not resumed:
                self.asked.clear()
                self.sent.clear()
            self.session = self.welcomed = True
            return [welcome(self.boot_id, resumed)]
        assert self.welcomed
        if isinstance(message, Submit):
            self.asked.setdefault(message.rid, self.chance.randrange(1, 30))
            self.sent[message.rid], self.upto[message.rid] = 0, message.credit
            return [Accepted(rid=message.rid)]
        if isinstance(message, Attach):
            if message.rid not in self.asked:
                return [Error(code=Code.INVALID_ARGUMENT, message="no such request", rid=message.rid)]
            self.sent[message.rid] = message.have[0].tokens if message.have else 0
            self.upto[message.rid] = message.credit
            return [Accepted(rid=message.rid, attached=True)]
        if isinstance(message, Credit):
            self.upto[message.rid] = max(self.upto[message.rid], message.upto)
        if isinstance(message, Ping):
            return [pong(message.t, self.boot_id)]
        return []

    def step(self) -> list[EngineMessage]:
        said: list[EngineMessage] = []
        for rid in list(self.sent):
            start = self.sent[rid]
            end = min(start + self.chance.randrange(4), self.asked[rid], self.upto[rid])
            if end > start:
                said.append(tokens(rid, start, *range(start, end)))
            self.sent[rid] = end
            if end == self.asked[rid]:
                said.append(finished(rid, end))
                del self.sent[rid]
        return said


FAULTS = ["none"] * 20 + ["cut"] * 3 + ["restart", "silence"]


def play(seed: int) -> tuple[Bench, Engine]:
    """250 turns; in the first 120 connections break, with what is under way in them, and engines are replaced."""
    chance = random.Random(seed)
    engine, bench = Engine(chance), up()
    engine.session = engine.welcomed = True
    down_until = 0.0
    for turn in range(250):
        sent = bench.turn(chance.choice([0.0, 0.01, 0.3]))
        if turn < 100 and chance.random() < 0.2:
            bench.submit(f"r{turn}")
            sent += bench.sent
        fault = chance.choice(FAULTS) if turn < 120 else "none"
        if fault != "none":
            engine.restart() if fault == "restart" else engine.cut()
            down_until = bench.clock.now + (chance.uniform(0, 3) if fault == "silence" else 0)
        if fault != "none" or bench.clock.now < down_until:
            bench.state.broken(fault)
            continue
        said = [answer for message in sent for answer in engine.obey(message)] + engine.step()
        for answer in said:
            if turn < 120 and chance.random() < 0.02:
                engine.cut()
                bench.state.broken("cut on the way")
                break
            bench.state.receive(encode(answer))
        read(bench)
    bench.state.close()
    bench.turn()
    return bench, engine


def read(bench: Bench) -> None:
    """Readers take what is there and give credit."""
    for sink, event in bench.state.take_events():
        sink.put(event)
    for rid, reader in bench.readers.items():
        if reader.end is None:
            bench.state.credit(rid, len(reader.tokens()) + 8)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_breaks_every_request_ends_once_and_what_ends_well_is_whole(seed: int) -> None:
    bench, engine = play(seed)
    for rid, reader in bench.readers.items():
        if isinstance(reader.end, Arrived):
            assert reader.tokens() == list(range(len(reader.tokens())))
            assert len(reader.tokens()) == engine.asked.get(rid, len(reader.tokens()))
        else:
            assert reader.error.code == Code.ENGINE_LOST
            assert not (reader.error.retry_safe and reader.tokens())


def test_these_plays_have_both_ends_and_most_requests_survive_a_cut() -> None:
    readers = [reader for seed in range(40) for reader in play(seed)[0].readers.values()]
    well = [reader for reader in readers if isinstance(reader.end, Arrived)]
    assert len(readers) > 500 and len(well) > len(readers) / 3 and len(well) < len(readers)

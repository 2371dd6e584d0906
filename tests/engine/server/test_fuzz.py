"""Frames from hostile and broken clients: nothing raises, nothing hangs, nothing is kept, and others are served."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections import Counter

import pytest
import zmq
from support.dealer import probe, resident
from support.oracle import VOCAB
from support.oracle_engine import MAX_LEN
from support.serving_process import configured, serving
from support.sim_checks import without_bugs
from support.sim_gate import SimGate
from support.wire_fuzz import Fuzz

from pagefork import SamplingParams, wire
from pagefork.limits import Limits
from pagefork.server.seam import Facts, Sent
from pagefork.server.service import Service

TOKEN = "sesame"
PER_PEER = 15  # fewer than the bad frames that end a session


class Attacked:
    """A service over the oracle engine; what it sends is read as a client reads it, and thrown away."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.gate = SimGate(self.clock, self.rng)
        self.said: Counter[str] = Counter()
        self.last: list[wire.EngineMessage] = []
        facts = Facts(model="oracle", vocab_size=VOCAB, max_model_len=MAX_LEN)
        limits = Limits(max_sessions=16, max_requests=64, max_reserved_tokens=4000, max_kept_bytes=1 << 16)
        self.service = Service(self.gate, self._send, facts, limits, token=TOKEN, clock=self.clock, urandom=self.rng.randbytes)

    def clock(self) -> float:
        return self.now

    def _send(self, peer: bytes, frames: list[bytes]) -> Sent:
        message, _ = wire.decode_from_engine(frames)
        self.said[type(message).__name__] += 1
        if peer == b"probe":
            self.last.append(message)
        return self.rng.choice([Sent.OK] * 8 + [Sent.FULL, Sent.GONE]) if peer != b"probe" else Sent.OK

    def run(self, seed: int, frames: int) -> None:
        """So many messages over connections that come and go, some of them welcome."""
        session = b""
        for number, message in enumerate(Fuzz(seed, ("a", "b", "c")).frames(frames)):
            peer = b"p%d" % (number // PER_PEER)
            if number % PER_PEER == 0 and self.rng.random() < 0.9:
                session = self.rng.choice([session, b""])
                self.service.receive(peer, wire.encode(wire.Hello(token=TOKEN, session=session or None)), None)
            self.service.receive(peer, message, None)
            if number % 4 == 0:
                self.turn(self.rng.choice([0.0, 0.01, 0.3]))

    def turn(self, seconds: float) -> None:
        self.now += seconds
        if self.gate.busy:
            self.gate.step()
        self.service.deliver(self.gate.take())
        assert self.service.tick() >= 0

    def assert_serves(self) -> None:
        """A probe request is served; once time has passed nothing is left."""
        for _ in range(60):
            self.turn(3.0)
        self.gate.engine.assert_idle()
        params = SamplingParams(seed=1, max_tokens=3)
        self.service.receive(b"probe", wire.encode(wire.Hello(token=TOKEN)), None)
        submit = wire.Submit(rid="probe", params=wire.encode_params(params), credit=9)
        self.service.receive(b"probe", wire.encode(submit, wire.encode_tokens([1, 2])), None)
        for _ in range(20):
            self.turn(0.01)
        assert [message.error for message in self.last if isinstance(message, wire.Finished)] == [None]
        self.service.receive(b"probe", wire.encode(wire.Stats()), None)
        for _ in range(20):
            self.turn(0.01)
        stats = next(message for message in self.last if isinstance(message, wire.StatsReply)).service
        assert (stats.sessions, stats.requests, stats.reserved_tokens) == (1, 0, 0)
        assert stats.malformed_frames > 0


def fuzz(seed: int, frames: int) -> Attacked:
    attacked = Attacked(seed)
    try:
        with without_bugs():
            attacked.run(seed, frames)
            attacked.assert_serves()
    except BaseException as error:
        error.add_note(f"seed {seed}, {frames} frames")
        raise
    return attacked


def test_ten_thousand_hostile_messages_are_survived() -> None:
    attacked = fuzz(0, 10_000)
    assert {"Welcome", "Accepted", "Error", "Finished", "Pong", "StatsReply", "Deltas"} <= attacked.said.keys()


def test_hostile_messages_leave_no_memory_behind() -> None:
    attacked = Attacked(1)
    attacked.run(1, 2000)
    tracemalloc.start()
    try:
        attacked.run(2, 1500)
        before = tracemalloc.get_traced_memory()[0]
        attacked.run(3, 3000)
        for _ in range(60):
            attacked.turn(3.0)
        assert tracemalloc.get_traced_memory()[0] - before < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.long
def test_a_million_hostile_messages_are_survived() -> None:
    for seed in range(100):
        fuzz(seed, 10_000)


def over_a_socket(count: int) -> None:
    with serving(configured(limits=Limits(max_sessions=500))) as engine:
        rng = random.Random(0)
        frames = Fuzz(0, ("a", "b", "c"))
        for warm_up in (True, False):
            if not warm_up:
                before = resident(engine.pid)
            for _ in range(count // PER_PEER // 2):
                _attack(engine.endpoint, frames, rng)
            probe(engine.endpoint, seconds=5.0)  # behind all that was sent
        time.sleep(3.0)  # leases end
        assert probe(engine.endpoint) < 1.0
        assert engine.exit_code is None
        assert resident(engine.pid) - before < 5 << 20


def _attack(endpoint: str, fuzz: Fuzz, rng: random.Random) -> None:
    """One connection's messages, and it reads some of the answers or none."""
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.linger = 500
        socket.sndtimeo = 5000
        socket.connect(endpoint)
        if rng.random() < 0.9:
            socket.send_multipart(wire.encode(wire.Hello()))
        for message in fuzz.frames(PER_PEER):
            socket.send_multipart(message or [b""])
        if rng.random() < 0.5:
            while socket.poll(20):
                wire.decode_from_engine(socket.recv_multipart())


def test_hostile_messages_over_a_real_socket_are_survived() -> None:
    over_a_socket(3000)


@pytest.mark.long
def test_many_hostile_messages_over_a_real_socket_are_survived() -> None:
    over_a_socket(100_000)

"""The service, its engine, clients and what lies between them in one thread. A seed gives the same run again."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter

from pagefork.limits import Limits
from pagefork.server.seam import Facts, Sent, Timing
from pagefork.server.service import Service
from support.oracle import VOCAB
from support.oracle_engine import MAX_LEN
from support.raw_client import Frames, Link, RawClient
from support.sim_gate import SimGate
from support.state_client import StateClient

TOKEN = "open sesame"
TIMING = Timing()
FACTS = Facts(model="oracle", vocab_size=VOCAB, max_model_len=MAX_LEN)
LIMITS = Limits(max_sessions=6, max_requests=8, max_reserved_tokens=120, max_forward_tokens=4000)


class World:
    """`seen` counts what happened, so that a test can tell that it has tested it."""

    def __init__(self, seed: int, clients: int = 4) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.seen: Counter[str] = Counter()
        self.links: dict[bytes, Link] = {}
        self.clients: list[RawClient] = []
        self.dead: list[RawClient] = []  # killed: nobody reads what they would get
        self.due = self.now
        self.broke = False
        self._transcript = hashlib.sha256()
        self.peers = itertools.count(1)
        self._names = itertools.count()
        self.rids = itertools.count()
        self.principals: dict[bytes, str | None] = {}
        self.boot()
        for _ in range(clients):
            self.arrive()

    def clock(self) -> float:
        return self.now

    @property
    def transcript(self) -> str:
        """All messages in their order."""
        return self._transcript.hexdigest()

    def boot(self) -> None:
        self.gate = SimGate(self.clock, self.rng)
        self.service = Service(
            self.gate, self._send, FACTS, LIMITS, TIMING, token=TOKEN, clock=self.clock, urandom=self.rng.randbytes
        )

    def arrive(self) -> None:
        name, token = f"c{next(self._names)}", self.rng.choice([TOKEN, None])
        client = StateClient(name, token, self.clock) if self.rng.random() < 0.5 else RawClient(name, token)
        self.clients.append(client)
        if not isinstance(client, StateClient):
            self.connect(client)

    def connect(self, client: RawClient) -> None:
        if client.link is not None:
            self.cut(client.link)
        link = Link(b"peer%d" % next(self.peers), self.rng.choice([2, 8, 256]))
        self.links[link.peer] = link
        self.principals[link.peer] = None if client.token else "curve:" + client.name
        client.connect(link, self.now)

    def cut(self, link: Link) -> None:
        link.there = False
        link.inward.clear()
        link.outward.clear()
        self.links.pop(link.peer, None)

    def _send(self, peer: bytes, frames: list[bytes]) -> Sent:
        link = self.links.get(peer)
        if link is None:
            return Sent.GONE
        if len(link.outward) >= link.capacity:
            self.seen["full"] += 1
            return Sent.FULL
        link.outward.append([bytes(frame) for frame in frames])
        self._transcript.update(b"".join((peer, *frames)))
        return Sent.OK

    def turn(self) -> None:
        """What follows from whatever happened."""
        for client in self.clients:
            if client.wants_link and (client.link is None or client.link.reads):
                self.connect(client)
        for link in self.links.values():
            assert len(link.outward) <= link.capacity

    def client(self) -> RawClient:
        return self.rng.choice(self.clients)

    def open(self, client: RawClient) -> list[str]:
        return [rid for rid, asked in client.asked.items() if not asked.over]

    def carry(self) -> None:
        """Some messages arrive, here and there."""
        links = [link for link in self.links.values() if link.inward]
        if links:
            link = self.rng.choice(links)
            for _ in range(min(len(link.inward), self.rng.choice([1, 1, 3, 10]))):
                self.to_service(link.peer, link.inward.popleft())
        for client in self.clients:
            link_ = client.link
            if link_ is not None and link_.reads and self.rng.random() < 0.5:
                self._to_client(client, self.rng.choice([1, 3, 20]))

    def to_service(self, peer: bytes, frames: Frames) -> None:
        self._transcript.update(b"".join((peer, *frames)))
        self.service.receive(peer, frames, self.principals[peer])
        self.due = min(self.due, self.now)

    def _to_client(self, client: RawClient, most: int) -> None:
        link = client.link
        assert link is not None
        for _ in range(min(len(link.outward), most)):
            client.receive(link.outward.popleft(), self.now)

    def step(self) -> None:
        if self.gate.busy:
            self.gate.step()
        self.service.deliver(self.gate.take())

    def pass_time(self, seconds: float | None = None) -> None:
        self.now += self.rng.choice([0.001, 0.01, 0.1, 0.5]) if seconds is None else seconds
        for client in self.clients:
            if client.link is None or client.link.reads:
                client.tick(self.now)
        if self.now >= self.due:
            wait = self.service.tick()
            assert wait >= 0
            self.due = self.now + wait

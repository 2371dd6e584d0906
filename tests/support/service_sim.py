"""The service, its engine, clients and what lies between them in one thread. A seed gives the same run again."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pagefork import wire
from pagefork.limits import Limits
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams
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
ROOTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 11, 12], [5], list(range(16))]  # prompts begin alike
PARAMS: list[CommonParams] = [
    *(SamplingParams(seed=seed, max_tokens=length) for seed, length in [(1, 1), (2, 5), (3, 30)]),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=1),
    SamplingParams(seed=4, n=3, max_tokens=14, logprobs=1),
    SamplingParams(seed=5, n=2, best_of=4, max_tokens=9),
    SamplingParams(seed=6, max_tokens=40, stop=["m", "bc"], ignore_eos=True),
    BeamSearchParams(beam_width=3, n=2, max_tokens=9),
    ContrastiveSearchParams(top_k=3, max_tokens=7, logprobs=0),
    MCTSParams(num_simulations=6, top_k=3, max_tokens=4, seed=7, leaf_batch_size=2),
    MCTSParams(num_simulations=4, top_k=2, rollout_tokens=2, max_tokens=3, seed=8),
]


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
        self._peers = itertools.count(1)
        self._names = itertools.count()
        self._rids = itertools.count()
        self._principals: dict[bytes, str | None] = {}
        self._boot()
        for _ in range(clients):
            self._arrive()

    def clock(self) -> float:
        return self.now

    @property
    def transcript(self) -> str:
        """All messages in their order."""
        return self._transcript.hexdigest()

    def _boot(self) -> None:
        self.gate = SimGate(self.clock, self.rng)
        self.service = Service(
            self.gate, self._send, FACTS, LIMITS, TIMING, token=TOKEN, clock=self.clock, urandom=self.rng.randbytes
        )

    def _arrive(self) -> None:
        name, token = f"c{next(self._names)}", self.rng.choice([TOKEN, None])
        client = StateClient(name, token, self.clock) if self.rng.random() < 0.5 else RawClient(name, token)
        self.clients.append(client)
        if not isinstance(client, StateClient):
            self._connect(client)

    def _connect(self, client: RawClient) -> None:
        if client.link is not None:
            self._cut(client.link)
        link = Link(b"peer%d" % next(self._peers), self.rng.choice([2, 8, 256]))
        self.links[link.peer] = link
        self._principals[link.peer] = None if client.token else "curve:" + client.name
        client.connect(link, self.now)

    def _cut(self, link: Link) -> None:
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

    def run(self, events: int) -> None:
        """So many things happen."""
        acts = [act for act, weight in self._weights() for _ in range(weight)]
        for _ in range(events):
            self.rng.choice(acts)()
            self._turn()

    def _turn(self) -> None:
        """What follows from whatever happened."""
        for client in self.clients:
            if client.wants_link and (client.link is None or client.link.reads):
                self._connect(client)
        for link in self.links.values():
            assert len(link.outward) <= link.capacity

    def _weights(self) -> list[tuple[Any, int]]:
        return [
            (self._carry, 24),
            (self._step, 14),
            (self._pass_time, 12),
            (self._submit, 4),
            (self._read, 8),
            (self._abort, 1),
            (self._again, 2),
            (self._reconnect, 1),
            (self._stop_reading, 1),
            (self._rare, 1),
        ]

    def _rare(self) -> None:
        self.rng.choices(
            [
                self._kill,
                self._bye,
                self._jump,
                self._break_a_step,
                self._restart,
                self._drain,
                self._change_a_body,
                self._intrude,
            ],
            [6, 2, 4, 2, 1, 2, 9, 4],
        )[0]()

    def _client(self) -> RawClient:
        return self.rng.choice(self.clients)

    def _carry(self) -> None:
        """Some messages arrive, here and there."""
        links = [link for link in self.links.values() if link.inward]
        if links:
            link = self.rng.choice(links)
            for _ in range(min(len(link.inward), self.rng.choice([1, 1, 3, 10]))):
                self._to_service(link.peer, link.inward.popleft())
        for client in self.clients:
            link_ = client.link
            if link_ is not None and link_.reads and self.rng.random() < 0.5:
                self._to_client(client, self.rng.choice([1, 3, 20]))

    def _to_service(self, peer: bytes, frames: Frames) -> None:
        self._transcript.update(b"".join((peer, *frames)))
        self.service.receive(peer, frames, self._principals[peer])
        self.due = min(self.due, self.now)

    def _to_client(self, client: RawClient, most: int) -> None:
        link = client.link
        assert link is not None
        for _ in range(min(len(link.outward), most)):
            client.receive(link.outward.popleft(), self.now)

    def _step(self) -> None:
        if self.gate.busy:
            self.gate.step()
        self.service.deliver(self.gate.take())

    def _pass_time(self, seconds: float | None = None) -> None:
        self.now += self.rng.choice([0.001, 0.01, 0.1, 0.5]) if seconds is None else seconds
        for client in self.clients:
            if client.link is None or client.link.reads:
                client.tick(self.now)
        if self.now >= self.due:
            wait = self.service.tick()
            assert wait >= 0
            self.due = self.now + wait

    def _submit(self) -> None:
        client = self._client()
        for _ in range(self.rng.choice([1, 1, 1, 5])):
            self._submit_one(client)

    def _submit_one(self, client: RawClient) -> None:
        prompt: str | list[int] = [*self.rng.choice(ROOTS), *(self.rng.randrange(VOCAB) for _ in range(self.rng.randrange(3)))]
        if self.rng.random() < 0.15:
            prompt = self.rng.choice(["abc", "é, no", "日", "a" * 30])
        fields: dict[str, Any] = {"stream": self.rng.random() < 0.8, "priority": self.rng.choice([0, 0, 0, 1, -1])}
        if self.rng.random() < 0.1:
            fields["deadline_ms"] = self.rng.choice([1, 50, 3000])
        client.submit(f"r{next(self._rids)}", prompt, self.rng.choice(PARAMS), self.rng.choice([0, 1, 4, 100]), **fields)
        self.seen["submit"] += 1

    def _open(self, client: RawClient) -> list[str]:
        return [rid for rid, asked in client.asked.items() if not asked.over]

    def _read(self) -> None:
        client = self._client()
        for rid in self._open(client)[:3]:
            client.credit(rid, client.asked[rid].upto + self.rng.choice([0, 1, 3, 50]))

    def _abort(self) -> None:
        client = self._client()
        if rids := self._open(client):
            client.abort(self.rng.choice(rids))
            self.seen["abort"] += 1

    def _again(self) -> None:
        """A message once more: the last one, or one of long ago, over another connection."""
        client = self._client()
        if client.sent and client.link is not None and client.welcomed:
            frames = self.rng.choice([client.sent[-1], self.rng.choice(client.sent)])
            message, _ = wire.decode_from_client(frames)
            if isinstance(message, wire.Bye):
                return
            if isinstance(message, wire.Hello) and (isinstance(client, StateClient) or message.session != client.session):
                return
            if isinstance(message, wire.Submit | wire.Attach):
                if isinstance(client, StateClient) or message.rid not in client.asked:
                    return  # it holds its engine to the letter, and never does this
                client.asked[message.rid].asks += 1
            client.link.inward.append(frames)
            self.seen["sent again"] += 1

    def _reconnect(self) -> None:
        """Whatever is on its way over a connection is lost with it."""
        client = self._client()
        if isinstance(client, StateClient):
            if client.link is not None:
                self._cut(client.link)
                client.cut()
        else:
            self._connect(client)
        self.seen["reconnect"] += 1

    def _stop_reading(self) -> None:
        """A client takes nothing for a while, and does not ping: stopped, or wedged."""
        client = self._client()
        if client.link is not None:
            client.link.reads = not client.link.reads
            self.seen["wedge"] += 1

    def _kill(self) -> None:
        if len(self.clients) > 2:
            client = self.clients.pop(self.rng.randrange(len(self.clients)))
            if client.link is not None:
                if self.rng.random() < 0.5:
                    self._cut(client.link)
                else:
                    client.link.reads = False
                    client.link.inward.clear()
            self.dead.append(client)
            self.seen["kill"] += 1
            self._arrive()

    def _bye(self) -> None:
        client = self._client()
        if client.welcomed:
            client.bye()
            self.seen["bye"] += 1

    def _jump(self) -> None:
        self._pass_time(self.rng.choice([6.0, 16.0, 40.0, 100.0]))
        self.seen["clock jumps"] += 1

    def _break_a_step(self) -> None:
        self.gate.engine.runner.breaks = True
        self.broke = True
        self.seen["a step breaks"] += 1

    def _restart(self) -> None:
        """kill -9: what was on its way to the engine waits for the next one, as it does in a DEALER."""
        if not self.service.drained:
            self.broke = True
        self._boot()
        for link in list(self.links.values()):
            if not link.reads or self.rng.random() < 0.3:
                self._cut(link)
                continue
            self.links.pop(link.peer)
            principal = self._principals[link.peer]
            link.peer = b"peer%d" % next(self._peers)
            self.links[link.peer] = link
            self._principals[link.peer] = principal
        self.due = self.now
        self.seen["restart"] += 1

    def _drain(self) -> None:
        """SIGTERM, and after it another engine."""
        self.service.drain(self.rng.choice([0.0, 1.0, 30.0]))
        self.seen["drain"] += 1
        for _ in range(4000):
            if self.service.drained:
                break
            self._carry()
            self._step()
            self._pass_time(0.05)
            self._turn()
        assert self.service.drained, "it drains for ever"
        assert not self.gate.engine.has_unfinished_requests()
        self._restart()

    def _change_a_body(self) -> None:
        """A request's name once more, for something else."""
        client = self._client()
        rids = [rid for rid, asked in client.asked.items() if asked.accepted and not asked.over]
        if rids and client.welcomed and client.link is not None and not isinstance(client, StateClient):
            before = client.asked[rids[0]].submit
            other = wire.Submit(rid=rids[0], text="another body", credit=before.credit, stream=before.stream)
            client.link.inward.append(wire.encode(other))
            self.seen["another body"] += 1

    def _intrude(self) -> None:
        """Somebody else's session, or no token, from a connection of its own: nothing of it may be seen."""
        victim = self._client()
        if victim.session is None:
            return
        link = Link(b"peer%d" % next(self._peers), 64)
        self.links[link.peer] = link
        self._principals[link.peer] = self.rng.choice([None, "curve:somebody else"])
        token = self.rng.choice(["wrong", None])
        self._to_service(link.peer, wire.encode(wire.Hello(token=token, session=victim.session)))
        for rid in [*victim.asked][-3:]:
            self._to_service(link.peer, wire.encode(wire.Attach(rid=rid, credit=100)))
            self._to_service(link.peer, wire.encode(wire.Abort(rid=rid)))
        while link.outward:
            message, _ = wire.decode_from_engine(link.outward.popleft())
            assert isinstance(message, wire.Error | wire.GoAway | wire.Welcome), f"an intruder is told {message}"
            assert not isinstance(message, wire.Welcome) or (not message.resumed and message.session != victim.session)
        self._cut(link)
        self.seen["intrude"] += 1

    def settle(self) -> None:
        """No more faults: everybody reads, until everything has ended; then time passes until nothing is kept."""
        for client in self.clients:
            if client.link is not None:
                client.link.reads = True
        for _ in range(6000):
            for client in self.clients:
                for rid in self._open(client):
                    if client.asked[rid].upto < 1000:
                        client.credit(rid, 1000)
            if not any(self._open(client) for client in self.clients):
                break
            self._carry()
            self._step()
            self._pass_time(0.02)
            self._turn()
        for client in self.clients:
            assert not self._open(client), f"{client.name} waits for ever for {self._open(client)}"
        for client in [*self.clients, *self.dead]:
            for rid in client.asked:
                client.check(rid)
            self._count(client)
        self._forget()

    def _forget(self) -> None:
        for link in list(self.links.values()):
            link.reads = True
            self._cut(link)
        self.clients, self.dead = [], []
        for _ in range(60):
            self._step()
            self._pass_time(5.0)
        self.gate.engine.assert_idle()
        stats = self._stats()
        assert (stats.service.requests, stats.service.reserved_tokens) == (0, 0), stats.service
        assert stats.service.sessions <= 1

    def _stats(self) -> wire.StatsReply:
        """From a client that came for nothing else."""
        client = RawClient("stats", None)
        self.clients.append(client)
        self._connect(client)
        assert client.link is not None
        client.link.capacity = 99
        found: deque[wire.EngineMessage] = deque()
        while client.link.inward:
            self._to_service(client.link.peer, client.link.inward.popleft())
        self._to_service(client.link.peer, wire.encode(wire.Stats()))
        for _ in range(50):
            self._step()
            while client.link.outward:
                found.append(wire.decode_from_engine(client.link.outward.popleft())[0])
        return next(message for message in found if isinstance(message, wire.StatsReply))

    def _count(self, client: RawClient) -> None:
        self.seen.update(f"told: {code}" for code in client.refusals)
        for asked in client.asked.values():
            if asked.refused is not None:
                what = f"refused: {asked.refused}"
            elif asked.finished is None:
                what = "lost" if asked.lost else "killed"
            else:
                what = "complete" if asked.finished.error is None else f"failed: {asked.finished.error.code}"
            self.seen[what] += 1
            self._check_end(client, asked, what)

    def _check_end(self, client: RawClient, asked: Any, what: str) -> None:
        """There was a reason for it."""
        rid = asked.submit.rid
        if what == "lost":
            known = client.lost_sessions or asked.aborted or self.seen["bye"] or self.seen["clock jumps"]
            assert known, f"{rid} is {what}"
        elif what == "failed: CANCELLED":
            assert asked.aborted or self.seen["drain"] or self.seen["sent again"], f"{rid} is {what}"
        elif what == "failed: DEADLINE":
            assert asked.submit.deadline_ms is not None
        elif what == "failed: STEP_FAILED":
            assert self.broke
        elif what == "failed: CLIENT_STALLED":
            assert self.seen["clock jumps"] or self.seen["wedge"] or self.seen["drain"], f"{rid} is {what}"
        elif what.startswith("failed"):
            assert what in {"failed: BUDGET_EXCEEDED", "failed: ENGINE_LOST", "failed: DRAINING"}, f"{rid} is {what}"


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg != "step %d failed":  # that is a fault which a simulation makes
            self.lines.append(self.format(record))


@contextmanager
def without_bugs() -> Iterator[None]:
    """What the service and its clients survive, and log as an error of their own, is an error here."""
    handler = _Collected()
    logger = logging.getLogger("pagefork")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not handler.lines, handler.lines[0]


def simulate(seed: int, events: int = 250, clients: int = 4) -> World:
    """One run, checked."""
    try:
        with without_bugs():
            world = World(seed, clients)
            world.run(events)
            world.settle()
    except BaseException as error:
        error.add_note(f"simulate({seed}, {events}, {clients}) gives it again")
        raise
    return world

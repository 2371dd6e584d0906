"""What has to hold at the end of a simulation, and that nothing was an error of the service's own."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pagefork import wire
from support.raw_client import Asked, RawClient
from support.sim_world import World


def settle(world: World) -> None:
    """No more faults: everybody reads, until everything has ended; then time passes until nothing is kept."""
    for client in world.clients:
        if client.link is not None:
            client.link.reads = True
    for _ in range(6000):
        for client in world.clients:
            for rid in world.open(client):
                if client.asked[rid].upto < 1000:
                    client.credit(rid, 1000)
        if not any(world.open(client) for client in world.clients):
            break
        world.carry()
        world.step()
        world.pass_time(0.02)
        world.turn()
    for client in world.clients:
        assert not world.open(client), f"{client.name} waits for ever for {world.open(client)}"
    for client in [*world.clients, *world.dead]:
        for rid in client.asked:
            client.check(rid)
        _count(world, client)
    _forget(world)


def _forget(world: World) -> None:
    for link in list(world.links.values()):
        link.reads = True
        world.cut(link)
    world.clients, world.dead = [], []
    for _ in range(60):
        world.step()
        world.pass_time(5.0)
    world.gate.engine.assert_idle()
    stats = _stats(world)
    assert (stats.service.requests, stats.service.reserved_tokens) == (0, 0), stats.service
    assert stats.service.sessions <= 1


def _stats(world: World) -> wire.StatsReply:
    """From a client that came for nothing else."""
    client = RawClient("stats", None)
    world.clients.append(client)
    world.connect(client)
    assert client.link is not None
    client.link.capacity = 99
    found: deque[wire.EngineMessage] = deque()
    while client.link.inward:
        world.to_service(client.link.peer, client.link.inward.popleft())
    world.to_service(client.link.peer, wire.encode(wire.Stats()))
    for _ in range(50):
        world.step()
        while client.link.outward:
            found.append(wire.decode_from_engine(client.link.outward.popleft())[0])
    return next(message for message in found if isinstance(message, wire.StatsReply))


def _count(world: World, client: RawClient) -> None:
    world.seen.update(f"told: {code}" for code in client.refusals)
    for asked in client.asked.values():
        if asked.refused is not None:
            what = f"refused: {asked.refused}"
        elif asked.finished is None:
            what = "lost" if asked.lost else "killed"
        else:
            what = "complete" if asked.finished.error is None else f"failed: {asked.finished.error.code}"
        world.seen[what] += 1
        _check_end(world, client, asked, what)


def _check_end(world: World, client: RawClient, asked: Asked, what: str) -> None:
    """There was a reason for it."""
    rid = asked.submit.rid
    if what == "lost":
        known = client.lost_sessions or asked.aborted or world.seen["bye"] or world.seen["clock jumps"]
        assert known, f"{rid} is {what}"
    elif what == "failed: CANCELLED":
        assert asked.aborted or world.seen["drain"] or world.seen["sent again"], f"{rid} is {what}"
    elif what == "failed: DEADLINE":
        assert asked.submit.deadline_ms is not None
    elif what == "failed: STEP_FAILED":
        assert world.broke
    elif what == "failed: CLIENT_STALLED":
        assert world.seen["clock jumps"] or world.seen["wedge"] or world.seen["drain"], f"{rid} is {what}"
    elif what.startswith("failed"):
        assert what in {"failed: BUDGET_EXCEEDED", "failed: ENGINE_LOST", "failed: DRAINING"}, f"{rid} is {what}"


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg != "a step failed":  # that is a fault which a simulation makes
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

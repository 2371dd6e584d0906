"""What happens in a simulation: what clients want, and everything that can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagefork import wire
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams
from support.oracle import VOCAB
from support.raw_client import Link, RawClient
from support.sim_world import World
from support.state_client import StateClient

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


def run(world: World, events: int) -> None:
    """So many things happen."""
    acts = [act for act, weight in OFTEN for _ in range(weight)]
    for _ in range(events):
        world.rng.choice(acts)(world)
        world.turn()


def _submit(world: World) -> None:
    client = world.client()
    for _ in range(world.rng.choice([1, 1, 1, 5])):
        _submit_one(world, client)


def _submit_one(world: World, client: RawClient) -> None:
    prompt: str | list[int] = [*world.rng.choice(ROOTS), *(world.rng.randrange(VOCAB) for _ in range(world.rng.randrange(3)))]
    if world.rng.random() < 0.15:
        prompt = world.rng.choice(["abc", "é, no", "日", "a" * 30])
    fields: dict[str, Any] = {"stream": world.rng.random() < 0.8, "priority": world.rng.choice([0, 0, 0, 1, -1])}
    if world.rng.random() < 0.1:
        fields["deadline_ms"] = world.rng.choice([1, 50, 3000])
    client.submit(f"r{next(world.rids)}", prompt, world.rng.choice(PARAMS), world.rng.choice([0, 1, 4, 100]), **fields)
    world.seen["submit"] += 1


def _read(world: World) -> None:
    client = world.client()
    for rid in world.open(client)[:3]:
        client.credit(rid, client.asked[rid].upto + world.rng.choice([0, 1, 3, 50]))


def _abort(world: World) -> None:
    client = world.client()
    if rids := world.open(client):
        client.abort(world.rng.choice(rids))
        world.seen["abort"] += 1


def _again(world: World) -> None:
    """A message once more: the last one, or one of long ago, over another connection."""
    client = world.client()
    if client.sent and client.link is not None and client.welcomed:
        frames = world.rng.choice([client.sent[-1], world.rng.choice(client.sent)])
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
        world.seen["sent again"] += 1


def _reconnect(world: World) -> None:
    """Whatever is on its way over a connection is lost with it."""
    client = world.client()
    if isinstance(client, StateClient):
        if client.link is not None:
            world.cut(client.link)
            client.cut()
    else:
        world.connect(client)
    world.seen["reconnect"] += 1


def _stop_reading(world: World) -> None:
    """A client takes nothing for a while, and does not ping: stopped, or wedged."""
    client = world.client()
    if client.link is not None:
        client.link.reads = not client.link.reads
        world.seen["wedge"] += 1


def _kill(world: World) -> None:
    if len(world.clients) > 2:
        client = world.clients.pop(world.rng.randrange(len(world.clients)))
        if client.link is not None:
            if world.rng.random() < 0.5:
                world.cut(client.link)
            else:
                client.link.reads = False
                client.link.inward.clear()
        world.dead.append(client)
        world.seen["kill"] += 1
        world.arrive()


def _bye(world: World) -> None:
    client = world.client()
    if client.welcomed:
        client.bye()
        world.seen["bye"] += 1


def _jump(world: World) -> None:
    world.pass_time(world.rng.choice([6.0, 16.0, 40.0, 100.0]))
    world.seen["clock jumps"] += 1


def _break_a_step(world: World) -> None:
    world.gate.engine.runner.breaks = True
    world.broke = True
    world.seen["a step breaks"] += 1


def _restart(world: World) -> None:
    """kill -9: what was on its way to the engine waits for the next one, as it does in a DEALER."""
    if not world.service.drained:
        world.broke = True
    world.boot()
    for link in list(world.links.values()):
        if not link.reads or world.rng.random() < 0.3:
            world.cut(link)
            continue
        world.links.pop(link.peer)
        principal = world.principals[link.peer]
        link.peer = b"peer%d" % next(world.peers)
        world.links[link.peer] = link
        world.principals[link.peer] = principal
    world.due = world.now
    world.seen["restart"] += 1


def _drain(world: World) -> None:
    """SIGTERM, and after it another engine."""
    world.service.drain(world.rng.choice([0.0, 1.0, 30.0]))
    world.seen["drain"] += 1
    for _ in range(4000):
        if world.service.drained:
            break
        world.carry()
        world.step()
        world.pass_time(0.05)
        world.turn()
    assert world.service.drained, "it drains for ever"
    assert not world.gate.engine.has_unfinished_requests()
    _restart(world)


def _change_a_body(world: World) -> None:
    """A request's name once more, for something else."""
    client = world.client()
    rids = [rid for rid, asked in client.asked.items() if asked.accepted and not asked.over]
    if rids and client.welcomed and client.link is not None and not isinstance(client, StateClient):
        before = client.asked[rids[0]].submit
        other = wire.Submit(rid=rids[0], text="another body", credit=before.credit, stream=before.stream)
        client.link.inward.append(wire.encode(other))
        world.seen["another body"] += 1


def _intrude(world: World) -> None:
    """Somebody else's session, or no token, from a connection of its own: nothing of it may be seen."""
    victim = world.client()
    if victim.session is None:
        return
    link = Link(b"peer%d" % next(world.peers), 64)
    world.links[link.peer] = link
    world.principals[link.peer] = world.rng.choice([None, "curve:somebody else"])
    token = world.rng.choice(["wrong", None])
    world.to_service(link.peer, wire.encode(wire.Hello(token=token, session=victim.session)))
    for rid in [*victim.asked][-3:]:
        world.to_service(link.peer, wire.encode(wire.Attach(rid=rid, credit=100)))
        world.to_service(link.peer, wire.encode(wire.Abort(rid=rid)))
    while link.outward:
        message, _ = wire.decode_from_engine(link.outward.popleft())
        assert isinstance(message, wire.Error | wire.GoAway | wire.Welcome), f"an intruder is told {message}"
        assert not isinstance(message, wire.Welcome) or (not message.resumed and message.session != victim.session)
    world.cut(link)
    world.seen["intrude"] += 1


def _rare(world: World) -> None:
    world.rng.choices([act for act, _ in RARE], [weight for _, weight in RARE])[0](world)


Event = Callable[[World], None]
OFTEN: list[tuple[Event, int]] = [  # and their weights
    (World.carry, 24),
    (World.step, 14),
    (World.pass_time, 12),
    (_submit, 4),
    (_read, 8),
    (_abort, 1),
    (_again, 2),
    (_reconnect, 1),
    (_stop_reading, 1),
    (_rare, 1),
]
RARE: list[tuple[Event, int]] = [
    (_kill, 6),
    (_bye, 2),
    (_jump, 4),
    (_break_a_step, 2),
    (_restart, 1),
    (_drain, 2),
    (_change_a_body, 9),
    (_intrude, 4),
]

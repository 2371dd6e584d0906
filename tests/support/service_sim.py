"""One run of the simulation."""

from __future__ import annotations

from support.sim_checks import settle, without_bugs
from support.sim_events import run
from support.sim_world import World


def simulate(seed: int, events: int = 250, clients: int = 4) -> World:
    """One run, checked."""
    try:
        with without_bugs():
            world = World(seed, clients)
            run(world, events)
            settle(world)
    except BaseException as error:
        error.add_note(f"simulate({seed}, {events}, {clients}) gives it again")
        raise
    return world

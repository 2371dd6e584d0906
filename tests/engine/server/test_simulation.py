"""The service, clients and the engine's scheduler with every fault, in one thread: a seed gives the same run again."""

from __future__ import annotations

from collections import Counter

import pytest
from support.service_sim import simulate

SITUATIONS = [
    "complete",
    "failed: CANCELLED",
    "failed: DEADLINE",
    "failed: STEP_FAILED",
    "failed: CLIENT_STALLED",
    "lost",
    "killed",
]
SITUATIONS += [
    "refused: QUEUE_FULL",
    "refused: DRAINING",
    "told: DUPLICATE_MISMATCH",
    "refused: CANCELLED",
    "refused: DEADLINE",
]
SITUATIONS += ["full", "wedge", "kill", "bye", "intrude", "restart", "drain", "clock jumps", "sent again"]


def test_every_request_has_one_end_and_gets_what_it_gets_alone_whatever_happens() -> None:
    seen: Counter[str] = Counter()
    for seed in range(120):
        seen += simulate(seed, events=100).seen
    assert all(seen[what] for what in SITUATIONS), seen


def test_a_seed_gives_the_same_run_again() -> None:
    first, again, other = simulate(7), simulate(7), simulate(8)
    assert first.transcript == again.transcript != other.transcript


@pytest.mark.long
def test_every_request_has_one_end_in_long_runs() -> None:
    for seed in range(10_000, 20_000):
        simulate(seed, events=1000, clients=6)

"""What tests ask of an engine in a process of its own, and processes that ask it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

from pagefork import LLM, SamplingParams, wire
from support.dealer import Dealer

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


def idle(dealer: Dealer) -> bool:
    stats = dealer.stats()
    engine, service = stats.engine, stats.service
    return (engine.num_running, engine.num_waiting, service.requests, service.reserved_tokens) == (0, 0, 0, 0) and (
        engine.free_blocks == engine.num_blocks
    )


def streaming(dealer: Dealer, count: int = 1, params: SamplingParams = LONG) -> list[str]:
    """Requests of which tokens have come."""
    rids = [dealer.submit(PROMPT, params) for _ in range(count)]
    waiting = set(rids)
    while waiting:
        waiting -= {delta.rid for delta in dealer.get(wire.Deltas).deltas}
    return rids


def tokens_of(demo: LLM, prompts: list[list[int]], params: list[Any]) -> list[list[list[int]]]:
    """What the engine in process gives."""
    outputs = demo.generate(prompts, params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def python(source: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(source), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.path.abspath("tests")},  # noqa: PTH100
    )

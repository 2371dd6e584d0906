"""Any mix of requests, replayed from graphs while the next step is planned, preempted and aborted, gets what it gets plainly.

Plainly: of an engine on a CPU that computes in torch, one step after another, with room for all.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.graphs import overlapping, steps_seen, with_graphs
from support.kernels import kernel_device, small_tasks, torch_layers, torch_reads
from support.late import LateRunner
from support.mixture import VOCAB, compared, driven, some_requests

from pagefork import LLM

SETTINGS: dict[str, Any] = {"dtype": "float32", "block_size": 4, "hidden_states": True, "max_num_seqs": 8, "max_model_len": 32}


class Both:
    """An engine whose steps are replayed and overlap, in a cache that is too small, and a plain one; and what was seen."""

    def __init__(self, path: str, device: torch.device, num_blocks: int) -> None:
        with overlapping():
            self.graphs = with_graphs(path, device, overlap=True, num_blocks=num_blocks, max_num_batched_tokens=14, **SETTINGS)
        with torch_layers(), torch_reads():
            self.plain = LLM(path, device="cpu", num_blocks=200, **SETTINGS)
        self.seen: Counter[str] = Counter()

    def agree(self, seed: int, count: int, new: int) -> int:
        """How many outputs of some requests differ by little. Odd seeds: a step is computed when its results are wanted."""
        rng, engine = random.Random(seed), self.graphs.engine
        runner = engine._built.runner
        engine._runner = LateRunner(runner) if seed % 2 else runner
        requests = some_requests(rng, count, longest=12, new=new)
        with steps_seen() as steps:
            done = driven(engine, requests, rng, aborts=0.12)
        self.seen["two steps are out"] += isinstance(engine._runner, LateRunner) and max(engine._runner.out) == 2
        self.seen.update("launched" if forward is None else "replayed" for _, forward in steps)
        self.seen.update("drawn by a graph" for _, forward in steps if forward is not None and forward.drawn is not None)
        self.seen.update(str(one.finish_reason) for output in done.values() for one in output.outputs)
        with torch_layers(), torch_reads():
            return compared(self.plain, requests, done)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1)
    with small_tasks():
        yield str(path)


def test_any_mix_gets_what_it_gets_plainly(model: str) -> None:
    both = Both(model, kernel_device(), num_blocks=13)
    assert sum(both.agree(seed, 4, new=4) for seed in (4, 5, 9, 11)) == 0
    assert +both.seen >= Counter(["launched", "replayed", "drawn by a graph", "two steps are out", "length", "abort"])


@pytest.mark.long
def test_many_mixes_get_what_they_get_plainly(model: str) -> None:
    both = Both(model, kernel_device(), num_blocks=21)  # the widest request fits, eight of them do not
    assert sum(both.agree(seed, 8, new=12) for seed in range(20, 60)) <= 3
    assert both.graphs.engine.stats().preemptions

"""Replayed steps of which two are out at a time: those that fail, that call Python, that score prompts, that are taken back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint
from support.graphs import overlapping, steps_seen, with_graphs
from support.kernels import kernel_device, small_tasks, torch_layers, torch_reads
from support.late import Broken
from support.mixture import VOCAB, Asked, compared, driven, unrepeated
from support.strategies import STRATEGIES

from pagefork import LLM, SamplingParams
from pagefork.scheduler.errors import StepFailedError
from pagefork.scheduler.plan import Kind

SETTINGS: dict[str, Any] = {"dtype": "float32", "block_size": 4, "hidden_states": True, "max_model_len": 32}
DRAW = random.Random(1)
PROMPTS = [[DRAW.randrange(3, VOCAB) for _ in range(length)] for length in (9, 6, 3, 17)]
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", vocab_size=VOCAB, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return str(path)


@pytest.fixture(scope="module")
def graphs(path: str) -> Iterator[LLM]:
    """Steps of at most 8 tokens."""
    with small_tasks(), overlapping():
        yield with_graphs(
            path, kernel_device(), overlap=True, num_blocks=24, max_num_seqs=8, max_num_batched_tokens=8, **SETTINGS
        )


@pytest.fixture(scope="module")
def plain(path: str) -> LLM:
    with torch_layers(), torch_reads():
        return LLM(path, device="cpu", num_blocks=200, **SETTINGS)


def agree(graphs: LLM, plain: LLM, requests: dict[str, Asked]) -> None:
    """All at once."""
    done = driven(graphs.engine, requests, random.Random(0), aborts=0)
    with torch_layers(), torch_reads():
        assert compared(plain, requests, done) == 0


def test_a_step_that_fails_while_another_is_out_leaves_nothing_behind(graphs: LLM, plain: LLM) -> None:
    engine = graphs.engine
    broken = Broken(engine._runner)
    engine._runner = broken
    try:
        for where in ("submit", "collect"):
            engine.add_request("a", PROMPTS[2], SAMPLED)
            engine.step()
            engine.step()
            assert engine._scheduler.in_flight == 1
            broken.breaks = where
            [output] = engine.step()
            assert isinstance(output.error, StepFailedError)
            agree(graphs, plain, {f"{i}": Asked(prompt, SAMPLED) for i, prompt in enumerate(PROMPTS[:2])})
    finally:
        engine._runner = broken._runner


def test_logits_processors_read_what_a_graph_left(graphs: LLM, plain: LLM) -> None:
    """Their tokens are those of the step before, which the host has not seen yet."""
    own = SAMPLED.replace(logits_processors=[unrepeated], logprobs=2)
    with steps_seen() as seen:
        agree(graphs, plain, {"own": Asked(PROMPTS[2], own), "other": Asked(PROMPTS[1], SAMPLED)})
    assert any(forward is not None and forward.drawn is None for _, forward in seen)


def test_prompts_are_scored_part_by_part_beside_samplers(graphs: LLM, plain: LLM) -> None:
    """A step with a part of a prompt is launched, the next is replayed."""
    requests = {
        "sampled": Asked(PROMPTS[2], SAMPLED.replace(n=4)),
        "scored": Asked(PROMPTS[0], SAMPLED.replace(prompt_logprobs=2)),
    }
    with steps_seen() as seen:
        agree(graphs, plain, requests)
    kinds = [(forward is not None, {probe.kind for probe in plan.probes}) for plan, forward in seen]
    assert (False, {Kind.SAMPLE, Kind.TARGET}) in kinds and kinds[-1] == (True, {Kind.SAMPLE})


def test_searches_that_lose_their_blocks_find_their_states_again(path: str, plain: LLM) -> None:
    """Contrastive search compares hidden states, and trees come back to nodes that they left; graphs wrote both."""
    small: dict[str, Any] = {"num_simulations": 4}
    kinds: dict[str, dict[str, Any]] = {"contrastive": {}, "MCTS": small}
    requests = {
        f"{i} {kind}": Asked(PROMPTS[i], STRATEGIES[kind](max_tokens=4, **own)) for i in range(2) for kind, own in kinds.items()
    }
    with small_tasks(), overlapping():
        llm = with_graphs(path, kernel_device(), overlap=True, num_blocks=9, max_num_seqs=8, **SETTINGS)
        with steps_seen() as seen:
            agree(llm, plain, requests)
    assert llm.engine.stats().preemptions and any(forward is not None for _, forward in seen)

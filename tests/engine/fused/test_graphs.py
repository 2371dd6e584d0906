"""Steps that are replayed from graphs generate what steps that are launched do, to the token; whoever is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.graphs import steps_seen, with_graphs
from support.kernels import torch_layers, torch_reads
from support.strategies import STRATEGIES
from support.waiting import no_waiting

from pagefork import LLM, RequestOutput, SamplingParams
from pagefork.runner import ModelRunner
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.plan import Plan

PROMPT = np.random.default_rng(3).integers(3, 200, 21).tolist()
SETTINGS: dict[str, Any] = {"dtype": "float32", "num_blocks": 40, "block_size": 8, "max_num_seqs": 12, "max_model_len": 60}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with qk-norms and heads that share keys, whose states are kept."""
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", vocab_size=200, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return str(path)


def generated(llm: LLM, params: list[CommonParams]) -> list[RequestOutput]:
    outputs = llm.generate([PROMPT[: 9 + i] for i in range(len(params))], params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    llm.engine.check()
    return outputs


def in_torch(path: str, device: torch.device, settings: dict[str, Any], params: list[CommonParams]) -> list[RequestOutput]:
    """What an engine without any kernel generates."""
    with torch_layers(), torch_reads():
        return generated(LLM(path, device=device.type, cuda_graphs=False, **settings), params)


def shown(outputs: list[RequestOutput]) -> list[Any]:
    return [[(one.token_ids, one.finish_reason) for one in output.outputs] for output in outputs]


def test_all_strategies_in_one_batch(path: str, device: torch.device) -> None:
    """Hidden states that contrastive search compares are written by graphs too; others read off what a graph leaves behind."""
    params = [make(max_tokens=2) for make in STRATEGIES.values()]
    params.append(SamplingParams(max_tokens=3, temperature=0.8, top_k=9, logprobs=3, seed=5))
    settings = {**SETTINGS, "hidden_states": True}
    with steps_seen() as seen:
        found = generated(with_graphs(path, device, **settings), params)
    assert any(forward is not None for _, forward in seen)
    expected = in_torch(path, device, settings, params)
    assert shown(found) == shown(expected)
    for one, other in zip(found[-1].outputs[0].logprobs or [], expected[-1].outputs[0].logprobs or [], strict=True):
        assert list(one) == list(other)
        assert [entry.logprob for entry in one.values()] == pytest.approx([entry.logprob for entry in other.values()], abs=1e-4)


def test_groups_that_are_preempted(path: str, device: torch.device) -> None:
    params = [STRATEGIES[name](max_tokens=6) for name in ("best_of", "beam")]
    settings = {**SETTINGS, "num_blocks": 12, "block_size": 4, "max_num_seqs": 8, "max_model_len": None}
    llm = with_graphs(path, device, **settings)
    assert shown(generated(llm, params)) == shown(in_torch(path, device, settings, params))
    assert llm.engine.stats().preemptions


def test_steps_are_submitted_without_waiting(path: str, device: torch.device) -> None:
    """Those of all strategies, launched and replayed: the host waits for what it collects, and for nothing else."""
    names = ("best_of", "contrastive", "MCTS, rollouts")
    params = [STRATEGIES[name](max_tokens=2, frequency_penalty=0.2) for name in names]
    llm = with_graphs(path, device, **{**SETTINGS, "max_num_seqs": 8}, hidden_states=True)
    expected = shown(generated(llm, params))  # compiles kernels
    submit = ModelRunner.submit

    def without_waiting(runner: ModelRunner, plan: Plan) -> None:
        with no_waiting(device):
            submit(runner, plan)

    with pytest.MonkeyPatch.context() as patch, steps_seen() as seen:
        patch.setattr(ModelRunner, "submit", without_waiting)
        assert shown(generated(llm, params)) == expected
    assert {forward is None for _, forward in seen} == {False, True}

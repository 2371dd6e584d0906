"""An engine that was warmed up is as one that was not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.strategies import PROMPTS, STRATEGIES

from pagefork import LLM, SamplingParams
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.plan import Kind, Plan, Result
from pagefork.warmup import warm_up

SETTINGS: dict[str, Any] = {
    "num_blocks": 120,
    "block_size": 8,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 96,
}


class Watched:
    """A runner that notes the plans it is given."""

    def __init__(self, llm: LLM) -> None:
        self._runner, self.plans = llm.engine._built.runner, list[Plan]()

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._runner.submit(plan)

    def collect(self) -> Result:
        return self._runner.collect()


def warmed(llm: LLM) -> list[Plan]:
    """Warms an engine up as one on a GPU is. Returns the plans that were run."""
    runner = Watched(llm)
    warm_up(runner, llm.engine._built.cache, llm.engine.config, llm.engine.max_model_len)
    return runner.plans


def shown(llm: LLM) -> list[Any]:
    """All that requests of every kind give."""
    params: list[CommonParams] = [make(max_tokens=6) for make in STRATEGIES.values()]
    params.append(SamplingParams(max_tokens=6, temperature=0.9, top_p=0.9, seed=3, repetition_penalty=1.2, logprobs=3))
    params.append(SamplingParams(max_tokens=6, temperature=0.9, no_repeat_ngram_size=2, seed=4, prompt_logprobs=2))
    prompts = [PROMPTS[index % len(PROMPTS)][:40] for index in range(len(params))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.engine.check()
    return [
        (output.error, [(one.token_ids, one.logprobs) for one in output.outputs], output.prompt_logprobs) for output in outputs
    ]


def test_warming_up_leaves_nothing_behind() -> None:
    """No slot, table or block: what fresh engines generate is generated, and all blocks are free."""
    llm = LLM("demo", dtype="float32", **SETTINGS)
    warmed(llm)
    llm.engine.check()
    assert llm.engine.stats().free_blocks == SETTINGS["num_blocks"]
    assert shown(llm) == shown(LLM("demo", dtype="float32", **SETTINGS))


def test_warming_up_covers_every_kind_of_step() -> None:
    plans = warmed(LLM("demo", dtype="float32", **SETTINGS))
    assert {probe.kind for plan in plans for probe in plan.probes} == set(Kind)
    assert any(len(plan.forks.src) and len(plan.copies.src) for plan in plans)
    assert any(len(plan.rows.trunk) for plan in plans)
    assert any(probe.window is not None for plan in plans for probe in plan.probes)
    lengths = [np.diff(plan.rows.offset).tolist() for plan in plans]
    assert all(found in lengths for found in ([96], [1], [1] * 12, [48, *[1] * 11]))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 2},
        {"num_blocks": 2, "max_num_batched_tokens": 8},
        {"max_model_len": 5, "hidden_states": False},
    ],
)
def test_the_smallest_engines_can_be_warmed_up(settings: dict[str, Any]) -> None:
    llm = LLM("demo", dtype="float32", **{**SETTINGS, **settings})
    for plan in warmed(llm):
        assert plan.rows.offset[-1] <= llm.engine.config.max_num_batched_tokens
        assert plan.tables.column.max() * 8 < llm.engine.max_model_len and plan.tables.block.max() <= llm.engine.config.num_blocks

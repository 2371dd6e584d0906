"""What outputs say besides tokens: what a request cost, and how its outputs came about."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from support.serving import read, running
from support.strategies import PROMPTS, STRATEGIES

from pagefork import (
    LLM,
    ContrastiveSearchParams,
    EngineConfig,
    LLMEngine,
    ParameterError,
    RequestOutput,
    SamplingParams,
    Trace,
)

SETTINGS: dict[str, Any] = {"dtype": "float32", "num_blocks": 1000, "max_num_seqs": 64, "batch_invariant": True}
COUNTS = ["forward_tokens", "forks", "blocks_copied"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", **SETTINGS)


@pytest.fixture
def engine(llm: LLM) -> Iterator[LLMEngine]:
    yield llm.engine
    llm.engine.check()
    assert llm.engine.stats().shared_block_ratio == 0


def streams(engine: LLMEngine, prompt: str, **fields: Any) -> dict[str, list[RequestOutput]]:
    """All outputs of each strategy, in one batch."""
    for name, make in STRATEGIES.items():
        engine.add_request(name, prompt, make(**fields))
    outputs: dict[str, list[RequestOutput]] = {name: [] for name in STRATEGIES}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def test_what_requests_cost_adds_up_to_what_the_engine_did(engine: LLMEngine) -> None:
    before = engine.stats()
    last = [outputs[-1] for outputs in streams(engine, PROMPTS[0]).values()]
    after = engine.stats()
    assert [output.error for output in last] == [None] * len(STRATEGIES)
    for name in COUNTS:
        assert sum(getattr(output.metrics, name) for output in last) == getattr(after, name) - getattr(before, name), name
    assert all(output.metrics.forward_tokens > 0 for output in last)


def test_what_a_request_cost_is_known_at_its_end(engine: LLMEngine) -> None:
    for name, outputs in streams(engine, PROMPTS[1], trace=True).items():
        for output in outputs[:-1]:
            assert not output.finished and output.trace is None, name
            assert output.metrics.finished_time is None and output.metrics.forward_tokens == 0, name


def test_outputs_that_share_a_prompt_say_how_much(engine: LLMEngine) -> None:
    """8 sequences of 200 tokens would hold 13 blocks each. They share all of them, and 12 once each has its own last one."""
    engine.add_request("alone", list(range(1, 201)), SamplingParams(max_tokens=4, ignore_eos=True))
    engine.add_request("eight", list(range(201, 401)), SamplingParams(max_tokens=4, n=8, ignore_eos=True))
    seen, done = [], {}
    while engine.has_unfinished_requests():
        done.update({output.request_id: output.metrics for output in engine.step() if output.finished})
        seen.append(engine.stats().shared_block_ratio)
    assert 7 * 12 / (8 * 13) <= done["eight"].shared_block_ratio <= 7 * 13 / (8 * 13)
    assert 7 * 12 / (9 * 13) in seen
    assert (done["eight"].forks, done["eight"].blocks_copied) == (7, 7)
    assert (done["alone"].shared_block_ratio, done["alone"].forks, done["alone"].blocks_copied) == (0, 0, 0)


def test_a_trace_comes_where_it_is_asked_for_and_can_be_written_down(engine: LLMEngine) -> None:
    params: dict[str, Any] = {name: make(trace=True) for name, make in STRATEGIES.items()}
    for name, asked in params.items():
        engine.add_request(name, PROMPTS[2], asked)
        engine.add_request(f"{name}, untraced", PROMPTS[2], asked.replace(trace=False))
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        done.update({output.request_id: output for output in engine.step() if output.finished})
    for name in STRATEGIES:
        assert done[f"{name}, untraced"].trace is None
        trace = done[name].trace
        assert isinstance(trace, Trace) and trace.complete
        assert trace.usage.forward_tokens == done[name].metrics.forward_tokens
        written = msgspec.json.decode(msgspec.json.encode(trace))
        assert written["strategy"] == type(params[name]).__struct_config__.tag
        assert len(written["steps"]) == len(trace.steps)
        assert bool(trace.steps) == (not isinstance(params[name], SamplingParams))


def test_a_request_that_ends_early_says_what_it_cost(engine: LLMEngine) -> None:
    engine.add_request("a", PROMPTS[0], STRATEGIES["n"](trace=True))
    engine.step()
    engine.abort_request("a")
    [*_, output] = engine.step()
    assert output.outputs[0].finish_reason == "abort"
    assert output.metrics.forward_tokens + output.metrics.cached_tokens >= len(output.prompt_token_ids)
    assert isinstance(output.trace, Trace)


def test_every_kind_of_decoding_streams_what_it_returns(llm: LLM) -> None:
    expected = llm.generate([PROMPTS[0]] * len(STRATEGIES), [make() for make in STRATEGIES.values()], use_tqdm=True)

    async def main() -> list[list[RequestOutput]]:
        async with running(**SETTINGS) as engine:
            return await asyncio.gather(*(read(engine, PROMPTS[0], make()) for make in STRATEGIES.values()))

    for outputs, whole in zip(asyncio.run(main()), expected, strict=True):
        assert [c.token_ids for c in outputs[-1].outputs] == [c.token_ids for c in whole.outputs]
        for output in outputs:
            for part, complete in zip(output.outputs, whole.outputs, strict=True):
                assert complete.token_ids[: len(part.token_ids)] == part.token_ids
                assert complete.text.startswith(part.text)


def test_what_needs_hidden_states_is_refused_where_they_are_not_kept() -> None:
    engine = LLMEngine(EngineConfig(model="demo", num_blocks=64, hidden_states=False))
    with pytest.raises(ParameterError, match=r"ContrastiveSearchParams needs the hidden states .* hidden_states=True"):
        engine.add_request("a", "def f(", ContrastiveSearchParams())
    assert not engine.has_unfinished_requests()

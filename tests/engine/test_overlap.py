"""Overlap: a step is planned while the one before it is computed, and nobody can tell by the outputs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from support.late import Broken, LateRunner
from support.oracle_engine import OracleEngine, alone
from support.strategies import PROMPTS, STRATEGIES
from torch import Tensor

from pagefork import BeamSearchParams, EngineConfig, LLMEngine, RequestOutput, SamplingParams
from pagefork.overlap import ThreadedRunner
from pagefork.scheduler.errors import StepFailedError
from pagefork.scheduler.params import CommonParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
AROUND = [LateRunner, ThreadedRunner]


def demo(overlap: bool, **settings: Any) -> LLMEngine:
    return LLMEngine(EngineConfig(model="demo", dtype="float32", overlap=overlap, **{"num_blocks": 400, **settings}))


def finish(engine: LLMEngine, steps: int = 2000) -> dict[str, RequestOutput]:
    """The last output of every request."""
    done = {}
    for _ in range(steps):
        if not engine.has_unfinished_requests():
            return done
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = output
    raise AssertionError("it goes on and on")


def assert_idle(engine: LLMEngine) -> None:
    engine.check()
    stats = engine.stats()
    assert stats.free_blocks == stats.num_blocks and not stats.num_running and not stats.num_waiting


def no_repeats(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
    logits[output] = -math.inf
    return logits


OWN: list[dict[str, Any]] = [
    {"stop": ["self", "\n\n"]},
    {"prompt_logprobs": 2, "logprobs": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"min_tokens": 4, "ignore_eos": False},
]


@pytest.mark.parametrize("blocks", [400, 24])
def test_every_strategy_gets_the_outputs_that_it_gets_without(blocks: int) -> None:
    engines = {overlap: demo(overlap, num_blocks=blocks, max_num_seqs=24, max_num_batched_tokens=64) for overlap in (False, True)}
    done = {}
    for overlap, engine in engines.items():
        for i, (name, make) in enumerate(STRATEGIES.items()):
            engine.add_request(name, PROMPTS[i % 3], make())
        for i, own in enumerate([*OWN, {"logits_processors": [no_repeats]}]):
            engine.add_request(f"own {i}", PROMPTS[i % 3], SamplingParams(**{"max_tokens": 20, "seed": i, **own}))
        done[overlap] = finish(engine)
        assert_idle(engine)
    assert done[True].keys() == done[False].keys()
    for name, output in done[True].items():
        assert output.error is None
        expected = [(completion.token_ids, completion.text, completion.finish_reason) for completion in done[False][name].outputs]
        assert [(found.token_ids, found.text, found.finish_reason) for found in output.outputs] == expected, name
        assert len(output.prompt_logprobs or ()) == len(done[False][name].prompt_logprobs or ())
    assert (engines[True].stats().preemptions > 0) == (blocks == 24)


def test_a_step_returns_the_outputs_of_the_one_before_it() -> None:
    engine = OracleEngine(around=LateRunner)
    engine.add_request("a", [1, 2, 3], GREEDY)
    counts = [[len(output.outputs[0].token_ids) for output in engine.step()] for _ in range(7)]
    assert counts == [[], [1], [2], [3], [4], [5], [6]], "the last output takes no further request"
    engine.assert_idle()


def test_an_output_that_ends_unforeseen_is_out_before_the_step_that_was_begun_in_vain_is_over() -> None:
    engine = OracleEngine(around=LateRunner)
    tokens = alone([1, 2, 3], GREEDY).outputs[0].token_ids
    last = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    engine.add_request("a", [1, 2, 3], GREEDY.replace(stop_token_ids=[tokens[last]]))
    outputs = [output for _ in range(last + 2) for output in engine.step()]
    assert outputs[-1].finished and outputs[-1].outputs[0].token_ids == tokens[: last + 1]
    assert engine.has_unfinished_requests() and engine.stats().free_blocks == engine.stats().num_blocks
    assert engine.step() == [] and not engine.has_unfinished_requests()
    engine.assert_idle()


def test_a_search_beside_samplers_is_read_at_once_and_afterwards_steps_overlap_again() -> None:
    engine = OracleEngine(around=LateRunner)
    runner: Any = engine._runner
    engine.add_request("sampled", [1, 2, 3], GREEDY.replace(max_tokens=30))
    engine.step()
    engine.add_request("beam", [4, 5], BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True))
    done: dict[str, RequestOutput] = {}
    while "beam" not in done:
        done |= {output.request_id: output for output in engine.step() if output.finished}
        assert engine._scheduler.in_flight == 0
    assert runner.out == [1, 2] + [1] * (len(runner.out) - 2), "the beam waited for nobody"
    del runner.out[:]
    done |= finish(engine)
    assert runner.out == [1] + [2] * (len(runner.out) - 1)
    for name, prompt in (("sampled", [1, 2, 3]), ("beam", [4, 5])):
        params = (
            GREEDY.replace(max_tokens=30) if name == "sampled" else BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True)
        )
        assert done[name].outputs == alone(prompt, params).outputs


@pytest.mark.parametrize("where", ["submit", "collect"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("around", AROUND)
def test_where_a_step_fails_all_that_are_out_are_given_up_and_the_engine_goes_on(
    around: Callable[[Any], Any], inside: bool, where: str
) -> None:
    engine = OracleEngine(around=(lambda runner: around(Broken(runner))) if inside else (lambda runner: Broken(around(runner))))
    broken: Any = engine._runner._runner if inside else engine._runner  # type: ignore[attr-defined]
    engine.add_request("old", [1, 2, 3], GREEDY)
    engine.step()
    engine.step()
    engine.add_request("new", [4, 5], GREEDY)
    broken.breaks = where
    done = {output.request_id: output for output in engine.step() if output.finished}
    engine.check()
    for _ in range(2):  # inside of a runner it fails when it is computed
        engine.add_request(f"later {engine._scheduler.counters.steps}", [6, 7, 8], GREEDY)
        done |= {output.request_id: output for output in engine.step() if output.finished}
    done |= finish(engine)
    assert isinstance(done["old"].error, StepFailedError) and isinstance(done["old"].error.__cause__, MemoryError)
    assert [output.error for output in done.values()].count(None) >= 1
    for name, output in done.items():
        if output.error is None:
            assert output.outputs == alone([4, 5] if name == "new" else [6, 7, 8], GREEDY).outputs
    engine.assert_idle()


@pytest.mark.parametrize("inside", [False, True])
def test_an_exit_goes_on_and_the_engine_stays_usable(inside: bool) -> None:
    engine = OracleEngine(around=lambda runner: ThreadedRunner(Broken(runner)) if inside else Broken(ThreadedRunner(runner)))
    broken: Any = engine._runner._runner if inside else engine._runner  # type: ignore[attr-defined]
    broken.error = KeyboardInterrupt()
    engine.add_request("a", [1, 2, 3], GREEDY)
    engine.step()
    broken.breaks = "submit"
    with pytest.raises(KeyboardInterrupt):
        finish(engine)
    engine.add_request("b", [1, 2, 3], GREEDY)
    done = finish(engine)
    assert isinstance(done["a"].error, StepFailedError) and done["b"].outputs == alone([1, 2, 3], GREEDY).outputs
    engine.assert_idle()


def some_request(rng: random.Random) -> tuple[list[int], CommonParams]:
    """A prompt, often with the beginning of another, and any strategy."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6][: rng.randrange(9)] + [rng.randrange(20) for _ in range(rng.randint(1, 12))]
    params = rng.choice(list(STRATEGIES.values()))(max_tokens=rng.randint(1, 10), ignore_eos=rng.random() < 0.5)
    if isinstance(params, SamplingParams) and rng.random() < 0.5:
        own = [{"stop": ["a", "ab"]}, {"stop_token_ids": [3, 11]}, {"frequency_penalty": 0.5}, {"prompt_logprobs": 1}]
        params = params.replace(**rng.choice(own))
    return prompt, params


def aborted_at_random(seed: int, around: Callable[[Any], Any]) -> None:
    rng = random.Random(seed)
    engine = OracleEngine(num_blocks=rng.choice([24, 60]), around=lambda runner: Broken(around(runner)))
    broken: Any = engine._runner
    requests = {str(i): some_request(rng) for i in range(10)}
    waiting, done = list(requests), dict[str, RequestOutput]()
    running: list[str] = []
    fails = rng.choice([-1, rng.randrange(20)])
    for step in range(1000):
        for name in waiting[: rng.randrange(4)]:
            waiting.remove(name)
            running.append(name)
            engine.add_request(name, *requests[name])
        if running and rng.random() < 0.15:
            name = rng.choice(running)
            rng.choice([engine.abort_request, lambda name: engine.discard([name])])(name)
        if step == fails:
            broken.breaks = rng.choice(["submit", "collect"])
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = output
        engine.check()
        running = [name for name in running if engine.has_request(name)]
        if not waiting and not engine.has_unfinished_requests():
            break
    engine.assert_idle()
    for name, output in done.items():
        expected = alone(*requests[name])
        assert output.error is None or isinstance(output.error, StepFailedError)
        if {completion.finish_reason for completion in output.outputs} <= {"stop", "length"}:
            assert output.outputs == expected.outputs
        else:
            for found, wanted in zip(output.outputs, expected.outputs, strict=True):
                assert found.token_ids == wanted.token_ids[: len(found.token_ids)]


@pytest.mark.parametrize("seed", range(60))
def test_aborts_and_failures_at_any_step_leave_the_others_what_they_get_alone(seed: int) -> None:
    aborted_at_random(seed, AROUND[seed % 2])

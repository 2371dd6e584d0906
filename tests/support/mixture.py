"""Random requests of all kinds, driven through an engine that may abort them, and compared with what they get elsewhere."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pagefork import LLM, LLMEngine, RequestOutput, SamplingParams
from pagefork.scheduler.params import CommonParams
from support.devices import excused
from support.strategies import STRATEGIES

VOCAB = 200


def unrepeated(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
    """A logits processor that never gives a token twice."""
    logits[output] = -math.inf
    return logits * 0.5


SAMPLED = ["greedy", "sampling", "n", "best_of"]
SMALL: dict[str, dict[str, Any]] = {"MCTS": {"num_simulations": 4}, "MCTS, rollouts": {"num_simulations": 3}}
OWN: list[dict[str, Any]] = [
    {"top_k": 9, "temperature": 0.8},
    {"logprobs": 2, "top_p": 0.8},
    {"prompt_logprobs": 1},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"logits_processors": [unrepeated]},
    {"stop_token_ids": list(range(0, VOCAB, 9))},
]


class Asked(NamedTuple):
    prompt: list[int]
    params: CommonParams


def some_requests(rng: random.Random, count: int, longest: int, new: int) -> dict[str, Asked]:
    """Of any strategy, with prompts of up to `longest` tokens that often begin alike, and up to `new` tokens of outputs."""
    prefix = [rng.randrange(3, VOCAB) for _ in range(longest)]
    found = {}
    for i in range(count):
        same = rng.randrange(longest)
        prompt = prefix[:same] + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest - same))]
        kind = rng.choice(SAMPLED if rng.random() < 0.4 else list(STRATEGIES))
        params = STRATEGIES[kind](max_tokens=rng.randint(1, new), ignore_eos=rng.random() < 0.5, **SMALL.get(kind, {}))
        if isinstance(params, SamplingParams):
            params = params.replace(seed=i, **(rng.choice(OWN) if rng.random() < 0.5 else {}))
        found[f"{i} {kind}"] = Asked(prompt, params)
    return found


def driven(engine: LLMEngine, requests: Mapping[str, Asked], rng: random.Random, aborts: float) -> dict[str, RequestOutput]:
    """The last output of each. They come a few at a time; a step aborts one with probability `aborts`."""
    waiting, running, done = list(requests), list[str](), dict[str, RequestOutput]()
    while waiting or engine.has_unfinished_requests():
        for name in waiting[: rng.randrange(4)]:
            waiting.remove(name)
            running.append(name)
            engine.add_request(name, *requests[name])
        if running and rng.random() < aborts:
            engine.abort_request(rng.choice(running))
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = output
        engine.check()
        running = [name for name in running if engine.has_request(name)]
    stats = engine.stats()
    assert stats.free_blocks == stats.num_blocks and not stats.num_running and not engine._scheduler.in_flight
    return done


def compared(plain: LLM, requests: Mapping[str, Asked], done: Mapping[str, RequestOutput]) -> int:
    """How many outputs differ from those that `plain` gives, by a margin that excuses it; fails if one differs by more.

    Of what was aborted, what there is must be the beginning.
    """
    assert done.keys() == requests.keys()
    prompts, params = zip(*requests.values(), strict=True)
    expected = plain.generate(list(prompts), list(params), use_tqdm=False)
    for (name, found), wanted in zip(((name, done[name]) for name in requests), expected, strict=True):
        assert found.error is None and wanted.error is None, name
        for one, other in zip(found.outputs, wanted.outputs, strict=True):
            if one.finish_reason == "abort":
                other.token_ids = other.token_ids[: len(one.token_ids)]
                one.score = other.score = None
            elif one.token_ids == other.token_ids:
                assert one.finish_reason == other.finish_reason, name
                assert math.isclose(one.cumulative_logprob, other.cumulative_logprob, abs_tol=1e-3), name
        assert_close(found.prompt_logprobs or (), wanted.prompt_logprobs or (), found.prompt_token_ids)
    ordered = [done[name].outputs for name in requests]
    return excused(plain, prompts, params, ordered, [output.outputs for output in expected])


def assert_close(found: Sequence[Any], expected: Sequence[Any], tokens: Sequence[int]) -> None:
    """Log-probs of a prompt's tokens."""
    for one, other, token in zip(found, expected, tokens, strict=False):
        assert (one is None) == (other is None)
        assert one is None or math.isclose(one[token].logprob, other[token].logprob, abs_tol=1e-4)

"""A long mixed load through a cache that is far too small for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint

from pagefork import EngineConfig, LLMEngine, RequestOutput, SamplingParams

VOCAB = 331


def some_request(rng: random.Random, prefixes: list[list[int]]) -> tuple[list[int], SamplingParams]:
    prompt = rng.choice(prefixes)[: rng.randrange(100)] + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 40))]
    fields: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "n": rng.choice([1, 1, 2, 3, 4]), "seed": rng.randrange(1 << 40)}
    if rng.random() < 0.2:
        fields |= {"temperature": 0.0, "n": 1}
    choices: dict[str, list[Any]] = {
        "temperature": [0.3, 1.0, 1.7], "top_k": [0, 1, 5, 50], "top_p": [1.0, 0.9, 0.4], "min_p": [0.0, 0.1],
        "repetition_penalty": [1.0, 1.3], "frequency_penalty": [0.0, 0.7], "presence_penalty": [0.0, -0.4],
        "no_repeat_ngram_size": [0, 0, 2], "min_tokens": [0, 1], "logit_bias": [None, {7: 4.0}], "logprobs": [None, 0, 3],
        "prompt_logprobs": [None, None, 0, 2],
        "stop_token_ids": [[], [11, 12, 13, 14]], "allowed_token_ids": [None, None, list(range(3, 90))],
    }  # fmt: skip
    for name, values in choices.items():
        if rng.random() < 0.5:
            fields.setdefault(name, rng.choice(values))
    return prompt, SamplingParams(**fields)


def engine(path: Path, **settings: Any) -> LLMEngine:
    return LLMEngine(EngineConfig(model=str(path), dtype="float32", **settings))


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def run_all(
    engine: LLMEngine, requests: dict[str, tuple[list[int], SamplingParams]], aborts: frozenset[str], rng: random.Random
) -> dict[str, RequestOutput]:
    """Requests arrive while others run; those in `aborts` are aborted some steps later."""
    waiting, done = list(requests.items()), {}
    due: list[tuple[int, str]] = []
    step = 0
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(len(waiting), rng.randrange(8))):
            name, (prompt, params) = waiting.pop(0)
            engine.add_request(name, prompt, params)
            if name in aborts:
                due.append((step + rng.randrange(40), name))
        for at, name in [entry for entry in due if entry[0] <= step]:
            engine.abort_request(name)
            due.remove((at, name))
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = output
        step += 1
        if step % 50 == 0:
            engine.check()
    return done


def mixed_load(path: Path, count: int, alone: int) -> None:
    """`count` requests together; `alone` of them once more, each by itself, must get the same tokens."""
    rng = random.Random(0)
    prefixes = [[rng.randrange(3, VOCAB) for _ in range(100)] for _ in range(4)]
    requests = {str(i): some_request(rng, prefixes) for i in range(count)}
    aborts = frozenset(name for name in requests if rng.random() < 0.1)
    small = engine(path, num_blocks=48, max_num_seqs=24, max_num_batched_tokens=96)
    done = run_all(small, requests, aborts, rng)
    assert done.keys() == requests.keys()
    small.check()
    stats = small.stats()
    assert stats.free_blocks == stats.num_blocks == 48 and not stats.num_running and not stats.num_waiting
    assert stats.preemptions > count // 50, "the cache was not too small after all"
    assert stats.prefix_hits > 0 and stats.blocks_copied > 0
    assert not [output.error for output in done.values() if output.error]

    roomy = engine(path, num_blocks=600, max_num_seqs=8, enable_prefix_caching=False)
    for name in list(requests)[:alone]:
        prompt, params = requests[name]
        roomy.add_request(name, prompt, params)
        (expected,) = [output for output in iter_steps(roomy) if output.finished]
        if done[name].outputs[0].finish_reason == "abort" or name in aborts:
            assert all(got == want[: len(got)] for got, want in zip(tokens(done[name]), tokens(expected), strict=True))
        else:
            assert tokens(done[name]) == tokens(expected), f"request {name} got other tokens than alone"


def iter_steps(engine: LLMEngine) -> list[RequestOutput]:
    found = []
    while engine.has_unfinished_requests():
        found += engine.step()
    return found


def test_2000_mixed_requests_through_a_small_cache_get_the_tokens_they_get_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=1, hidden_size=32)
    mixed_load(tmp_path, 2000, alone=400)


@pytest.mark.long
def test_2000_mixed_requests_all_compared_with_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    mixed_load(tmp_path, 2000, alone=2000)

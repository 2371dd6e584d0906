"""Log-probs of the prompt's tokens equal those of transformers, however the prompt is computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from transformers import AutoModelForCausalLM

from pagefork import LLM, EngineConfig, LLMEngine, ParameterError, RequestOutput, SamplingParams
from pagefork.demo import demo_path

PROMPT = np.random.default_rng(3).integers(1, 4096, 75).tolist()
PLAIN = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)


@pytest.fixture(scope="module")
def rows() -> book.Row:
    """Logits of transformers at every position of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    with torch.inference_mode():
        found: book.Row = model(torch.tensor([PROMPT])).logits[0].numpy()
    return found


def assert_right(output: RequestOutput, rows: book.Row, top: int = 2) -> None:
    entries = output.prompt_logprobs
    assert entries is not None and len(entries) == len(PROMPT) and entries[0] is None
    for position in range(1, len(PROMPT)):
        entry, row, token = entries[position], rows[position - 1], PROMPT[position]
        assert entry is not None
        logp = book.log_softmax(row)
        best = set(np.argsort(-row)[:top].tolist())
        assert set(entry) == {token} | best
        assert all(abs(found.logprob - logp[other]) < 1e-4 for other, found in entry.items())
        # Two tokens closer to each other than the two computations are may change places.
        assert entry[token].rank in range(1 + (row > row[token] + 1e-4).sum(), 2 + (row > row[token] - 1e-4).sum())
        assert next(iter(entry)) == token and entry[token].decoded_token is not None


@pytest.mark.parametrize("budget", [8, 17, 2048])
def test_raw_logprobs_equal_transformers_in_any_chunks(rows: book.Row, budget: int) -> None:
    llm = LLM("demo", dtype="float32", num_blocks=60, max_num_batched_tokens=budget)
    beside = PLAIN.replace(prompt_logprobs=None)
    outputs = llm.generate([PROMPT, PROMPT[:40], PROMPT], [PLAIN, beside, beside], use_tqdm=False)
    assert_right(outputs[0], rows)
    assert outputs[1].prompt_logprobs is None
    assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids


def test_a_cached_prompt_is_scored_all_the_same_and_serves_the_cache(rows: book.Row) -> None:
    llm = LLM("demo", dtype="float32", num_blocks=60)
    for params in (PLAIN.replace(prompt_logprobs=None), PLAIN, PLAIN.replace(prompt_logprobs=None)):
        [output] = llm.generate(PROMPT, params, use_tqdm=False)
        if params is PLAIN:
            assert_right(output, rows)
    assert output.metrics.cached_tokens == 64


def test_preemption_in_the_middle_of_a_prompt_loses_and_repeats_nothing(rows: book.Row) -> None:
    engine = LLMEngine(EngineConfig(model="demo", dtype="float32", num_blocks=24, block_size=8, max_num_batched_tokens=24))
    engine.add_request("old", PROMPT[:30], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    engine.add_request("scored", PROMPT, PLAIN)
    for _ in range(3):
        engine.step()
    engine._scheduler.residents._preempt(max(engine._scheduler.residents.running.values(), key=lambda group: group.order))
    done = {}
    while engine.has_unfinished_requests():
        done.update({output.request_id: output for output in engine.step()})
    assert done["scored"].metrics.preemptions > 0
    assert_right(done["scored"], rows)


def test_the_whole_vocabulary_can_be_asked_for(rows: book.Row) -> None:
    llm = LLM("demo", dtype="float32", num_blocks=60)
    [output] = llm.generate(PROMPT[:3], PLAIN.replace(prompt_logprobs=-1), use_tqdm=False)
    assert output.prompt_logprobs is not None
    for row, entry in zip(rows, output.prompt_logprobs[1:], strict=False):
        assert entry is not None and len(entry) == 4096
        assert abs(math.fsum(math.exp(found.logprob) for found in entry.values()) - 1) < 1e-4
        logp = book.log_softmax(row)
        assert max(abs(found.logprob - logp[token]) for token, found in entry.items()) < 1e-4


def test_processed_logprobs_are_of_the_distribution_that_would_be_drawn_from_at_each_place(rows: book.Row) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.7, "top_k": 900, "repetition_penalty": 1.4, "logit_bias": {PROMPT[4]: 2.0}, "min_tokens": 2,
        "frequency_penalty": 1.0, "no_repeat_ngram_size": 2,
    }  # fmt: skip
    llm = LLM("demo", dtype="float32", num_blocks=60, max_num_batched_tokens=20)
    params = SamplingParams(prompt_logprobs=0, logprobs_mode="processed", max_tokens=2, **settings)
    output, beside = llm.generate([PROMPT, PROMPT], [params, PLAIN], use_tqdm=False)
    assert_right(beside, rows)
    spec = settings | {"logit_bias": list(settings["logit_bias"].items())}
    outside = 0
    assert output.prompt_logprobs is not None
    for position in range(1, len(PROMPT)):
        entry = output.prompt_logprobs[position]
        x = book.adjusted(rows[position - 1], PROMPT[:position], position, spec)
        with np.errstate(divide="ignore"):
            expected = np.log(book.kept(x, spec).probs[PROMPT[position]])
        assert entry is not None
        found = entry[PROMPT[position]].logprob
        assert found == expected if np.isinf(expected) else abs(found - expected) < 1e-4
        outside += np.isinf(expected)
    assert 0 < outside < len(PROMPT) - 1


@pytest.mark.parametrize("value", [-2, 1.5, "all"])
def test_other_counts_are_refused(value: Any) -> None:
    with pytest.raises(ParameterError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=value)

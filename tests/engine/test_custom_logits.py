"""Logits processors of single requests: what they see, what they may do, and that only their own request feels them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pagefork import LLM, NoTokenError, ParameterError, RequestOutput, SamplingParams, StepFailedError

PROMPT = [5, 9, 200, 7]
VOCAB = 4096


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("demo", dtype="float32", num_blocks=100, max_num_seqs=16, max_num_batched_tokens=64)
    yield llm
    llm.engine.check()
    stats = llm.engine.stats()
    assert stats.free_blocks == stats.num_blocks
    assert not llm.engine._runner.processors._registered, "processors outlive their request"


def run(llm: LLM, *params: SamplingParams) -> list[RequestOutput]:
    return llm.generate([PROMPT] * len(params), list(params), use_tqdm=False)


class Silent(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Only:
    """Forces a sequence of tokens, and remembers what it was called with."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.calls: list[tuple[list[int], list[int]]] = []

    def __call__(self, prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        assert logits.shape == (VOCAB,) and logits.dtype == torch.float32
        self.calls.append((prompt, output))
        forced = torch.full_like(logits, -torch.inf)
        forced[self.tokens[len(output)]] = 0
        return forced


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_a_processor_decides_and_is_called_once_per_token_with_the_tokens_so_far(llm: LLM, mode: Any) -> None:
    only = Only([11, 22, 33])
    params = SamplingParams(max_tokens=3, logprobs=2, logprobs_mode=mode, logits_processors=[only], seed=1)
    [alone] = run(llm, SamplingParams(max_tokens=3, seed=1, logprobs=2))
    forced, beside = run(llm, params, SamplingParams(max_tokens=3, seed=1, logprobs=2))
    assert forced.outputs[0].token_ids == [11, 22, 33]
    assert only.calls == [(PROMPT, []), (PROMPT, [11]), (PROMPT, [11, 22])]
    assert beside.outputs == alone.outputs, "a neighbour is processed"
    assert forced.outputs[0].logprobs is not None and alone.outputs[0].logprobs is not None
    first, raw = forced.outputs[0].logprobs[0], alone.outputs[0].logprobs[0]
    assert first[11].logprob == 0 if mode == "processed" else set(raw) - {alone.outputs[0].token_ids[0]} <= set(first)


def test_every_forked_sequence_is_processed_on_its_own(llm: LLM) -> None:
    seen = []

    def watch(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        seen.append(tuple(output))
        logits[output] = -torch.inf
        return logits

    [request] = run(llm, SamplingParams(n=3, max_tokens=6, temperature=1.5, seed=3, logits_processors=[watch]))
    for output in request.outputs:
        ids = output.token_ids
        assert len(set(ids)) == len(ids)
        assert all(tuple(ids[:count]) in seen for count in range(len(ids)))


def test_processors_run_in_order_after_the_penalties_and_before_the_temperature(llm: LLM) -> None:
    rows: list[Tensor] = []

    def keep(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        rows.append(logits.clone())
        return logits * 2

    params = SamplingParams(max_tokens=1, temperature=0.5, logit_bias={3: 4.0}, repetition_penalty=2.0, seed=0)
    run(llm, params.replace(logits_processors=[keep]), params.replace(logits_processors=(keep, keep)))
    assert torch.equal(rows[1], rows[0]) and torch.equal(rows[2], rows[0] * 2)
    run(llm, SamplingParams(max_tokens=1, logits_processors=[keep]))
    raw = rows[3]
    expected = raw.clone()
    expected[3] += 4.0
    for token in PROMPT:
        expected[token] = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
    assert torch.equal(rows[0], expected)


def test_preempted_sequences_are_not_processed_twice(llm: LLM) -> None:
    small = LLM("demo", dtype="float32", num_blocks=12, block_size=4, max_num_seqs=4)
    calls: list[tuple[int, ...]] = []

    def count(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        calls.append((prompt[0], *output))
        return logits

    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logits_processors=[count])
    outputs = small.generate([[i, 5, 6] for i in (1, 2, 3)], params, use_tqdm=False)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert len(calls) == len(set(calls)) == 60


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda prompt, output, logits: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda prompt, output, logits: None, "it returned NoneType; a logits processor returns logits \\[4096\\]"),
        (lambda prompt, output, logits: logits[:-1], "returned torch.float32 \\[4095\\]"),
        (lambda prompt, output, logits: logits.long(), "returned torch.int64"),
        (lambda prompt, logits: logits, "TypeError"),
        (lambda prompt, output, logits: logits.to_sparse(), "a logits processor failed"),
        (lambda prompt, output, logits: torch.empty_like(logits, device="meta"), "a logits processor failed"),
        (lambda prompt, output, logits: logits.resize_(0), "returned torch.float32 \\[0\\]"),
        (lambda prompt, output, logits: logits.fill_(-torch.inf), "left no token to draw"),
        (lambda prompt, output, logits: logits.fill_(torch.nan), "ValueError: it returned NaN or \\+inf"),
        (lambda prompt, output, logits: logits.fill_(torch.inf), "ValueError: it returned NaN or \\+inf"),
    ],
)
def test_a_processor_that_fails_ends_its_request_with_the_reason_and_no_other(llm: LLM, bad: Any, message: str) -> None:
    plain = SamplingParams(max_tokens=4, temperature=0)
    [alone] = run(llm, plain)
    failed, beside = run(llm, plain.replace(logits_processors=[bad]), plain)
    with pytest.raises(NoTokenError, match=message):
        raise failed.error or AssertionError
    assert failed.outputs[0].finish_reason == "error"
    assert beside.outputs == alone.outputs


def test_a_tensor_that_a_processor_uses_again_is_read_before(llm: LLM) -> None:
    class Reusing:
        def __init__(self) -> None:
            self.buffer = torch.zeros(VOCAB)

        def __call__(self, prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
            return self.buffer.copy_(logits)

    params = SamplingParams(n=3, max_tokens=5, seed=2, logprobs=3, logprobs_mode="processed")
    [plain] = run(llm, params)
    [reused] = run(llm, params.replace(logits_processors=[Reusing()]))
    assert reused.outputs == plain.outputs


def test_a_processor_is_called_once_per_place_of_a_scored_prompt_and_not_again_once_it_failed(llm: LLM) -> None:
    calls = []

    def failing(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        calls.append(len(prompt) + len(output))
        if len(calls) == 4:
            raise RuntimeError("enough")
        return logits

    prompt = list(range(5, 45))
    params = SamplingParams(max_tokens=2, prompt_logprobs=0, logprobs_mode="processed", logits_processors=[failing])
    [output] = llm.generate([prompt], params, use_tqdm=False)
    assert isinstance(output.error, NoTokenError) and len(calls) == 4
    assert not llm.engine._runner.processors._rows, "rows outlive their step"


def test_what_a_request_does_to_itself_leaves_the_prefix_in_the_cache(llm: LLM) -> None:
    prompt = list(range(5, 70))
    plain = SamplingParams(max_tokens=2, temperature=0)
    llm.generate([prompt], plain, use_tqdm=False)
    hostile = [
        plain.replace(allowed_token_ids=[500], no_repeat_ngram_size=1, max_tokens=4),
        plain.replace(logits_processors=[lambda prompt, output, logits: 1 / 0]),
    ]
    for params in hostile:
        [failed] = llm.generate([prompt], params, use_tqdm=False)
        assert isinstance(failed.error, NoTokenError)
    [after] = llm.generate([prompt], plain, use_tqdm=False)
    assert after.metrics.cached_tokens == 64


def test_an_interrupt_inside_a_processor_goes_through_and_leaves_the_engine_usable(llm: LLM) -> None:
    plain = SamplingParams(max_tokens=3, temperature=0)
    [alone] = run(llm, plain)

    def leave(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llm, plain.replace(logits_processors=[leave]), plain)
    [after] = run(llm, plain)
    assert after.outputs == alone.outputs


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), Silent()], ids=["exit", "cancelled", "silent"])
def test_whatever_a_callable_raises_ends_its_own_request(llm: LLM, error: BaseException) -> None:
    def fail(*_: object) -> Any:
        raise error

    plain = SamplingParams(max_tokens=3)
    processed, ranked, beside = run(
        llm, plain.replace(logits_processors=[fail]), plain.replace(best_of=2, rank_by=fail), plain.replace(seed=1)
    )
    assert isinstance(processed.error, NoTokenError) and isinstance(ranked.error, StepFailedError)
    assert beside.error is None and len(beside.outputs[0].token_ids) == 3


@pytest.mark.parametrize("value", [0, [1], ["x"], lambda: 0])
def test_what_is_no_list_of_callables_is_refused(value: Any) -> None:
    if callable(value):
        assert SamplingParams(logits_processors=[value]).logits_processors == [value]
        value = {value}
    with pytest.raises(ParameterError, match=r"logits_processors=.* is a list of callables"):
        SamplingParams(logits_processors=value)

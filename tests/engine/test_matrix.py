"""Every decoding strategy with every feature, all strategies in one batch: what a feature does is seen in each one's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
from support.strategies import PROMPTS, STRATEGIES

from pagefork import LLM, CompletionOutput, LLMEngine, RequestOutput, SamplingParams
from pagefork.scheduler.group import Group

Outputs = dict[str, list[RequestOutput]]  # by strategy, one per prompt
ENGINE: dict[str, Any] = {"dtype": "float32", "batch_invariant": True, "max_num_seqs": 256, "num_blocks": 3000}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("demo", **ENGINE)
    yield llm
    llm.engine.check()
    stats = llm.engine.stats()
    assert (stats.free_blocks, stats.num_running, stats.num_waiting) == (stats.num_blocks, 0, 0)


@pytest.fixture(scope="module")
def plain(llm: LLM) -> Outputs:
    """Without any feature."""
    return run(llm)


def run(llm: LLM, prompts: Sequence[str | list[int]] = PROMPTS, **fields: Any) -> Outputs:
    """All strategies on all prompts in one batch."""
    params = [make(**fields) for make in STRATEGIES.values() for _ in prompts]
    outputs = llm.generate(list(prompts) * len(STRATEGIES), params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return {name: outputs[i * len(prompts) : (i + 1) * len(prompts)] for i, name in enumerate(STRATEGIES)}


def completions(outputs: Outputs) -> Iterator[tuple[str, list[CompletionOutput]]]:
    """By strategy, the completions of all prompts."""
    for name, requests in outputs.items():
        yield name, [completion for request in requests for completion in request.outputs]


def shown(outputs: Outputs) -> dict[str, list[list[tuple[list[int], str, str | None]]]]:
    """What a user gets of each request."""
    return {
        name: [[(output.token_ids, output.text, output.finish_reason) for output in request.outputs] for request in requests]
        for name, requests in outputs.items()
    }


def repeated(found: list[CompletionOutput], n: int = 1) -> int:
    """How many n-grams came again within their output."""
    grams = [list(zip(*(output.token_ids[i:] for i in range(n)), strict=False)) for output in found]
    return sum(len(own) - len(set(own)) for own in grams)


def test_stop_texts_end_outputs_and_are_not_in_them(llm: LLM) -> None:
    for name, found in completions(run(llm, stop=["e", "\n"])):
        assert not any("e" in output.text or "\n" in output.text for output in found), name
        assert any(output.stop_reason in ("e", "\n") and output.finish_reason == "stop" for output in found), name
        assert all(len(output.token_ids) == 14 for output in found if output.finish_reason == "length"), name


def test_stop_tokens_end_outputs(llm: LLM, plain: Outputs) -> None:
    stops = sorted({output.token_ids[4] for _, found in completions(plain) for output in found})
    for name, found in completions(run(llm, stop_token_ids=stops)):
        assert not any(set(output.token_ids[:-1]) & set(stops) for output in found), name
        ended = [output for output in found if output.finish_reason == "stop"]
        assert ended and all(output.stop_reason == output.token_ids[-1] for output in ended), name


def test_end_tokens_are_banned_until_min_tokens(llm: LLM, plain: Outputs) -> None:
    stops = sorted({token for _, found in completions(plain) for output in found for token in output.token_ids[:5]})
    short = dict(completions(run(llm, stop_token_ids=stops)))
    for name, found in completions(run(llm, stop_token_ids=stops, min_tokens=6)):
        assert min(len(output.token_ids) for output in short[name]) < 6 <= min(len(output.token_ids) for output in found), name
        assert not any(set(output.token_ids[:6]) & set(stops[:-1]) for output in found if len(output.token_ids) > 6), name


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 3.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}], ids=str)
def test_penalties_make_tokens_come_again_less_often(llm: LLM, penalty: dict[str, float]) -> None:
    """Few tokens are allowed, so that all strategies repeat themselves."""
    few = {"allowed_token_ids": list(range(260, 290)), "max_tokens": 20}
    free = dict(completions(run(llm, **few)))
    for name, found in completions(run(llm, **few, **penalty)):
        assert repeated(found) < repeated(free[name]), name


def test_allowed_tokens_are_the_only_ones(llm: LLM) -> None:
    allowed = [10, 20, 300, 301, 302, 400]
    for name, found in completions(run(llm, allowed_token_ids=allowed)):
        assert {token for output in found for token in output.token_ids} <= set(allowed), name


def test_bad_words_are_absent(llm: LLM, plain: Outputs) -> None:
    words = [" self", "self", " the", ":\n", "os", " os", "\n"]
    before = dict(completions(plain))
    for name, found in completions(run(llm, bad_words=words)):
        tokenizer = llm.engine.tokenizer
        assert tokenizer is not None
        banned = {ids[0] for word in words if len(ids := tokenizer.encode_plain(word)) == 1}
        assert any(banned & set(output.token_ids) for output in before[name]), f"{name}: nothing was there to ban"
        assert not any(banned & set(output.token_ids) for output in found), name


def test_biased_tokens_are_everywhere_or_nowhere(llm: LLM, plain: Outputs) -> None:
    for name, found in completions(run(llm, logit_bias={300: 100.0})):
        assert all(set(output.token_ids) == {300} for output in found if output.index == 0), name
    popular = {output.token_ids[0] for _, found in completions(plain) for output in found}
    for name, found in completions(run(llm, logit_bias=dict.fromkeys(popular, -100.0))):
        assert not any(popular & set(output.token_ids) for output in found), name


def test_no_ngram_comes_twice(llm: LLM) -> None:
    few = {"allowed_token_ids": list(range(260, 275)), "max_tokens": 20}
    free = dict(completions(run(llm, **few)))
    for name, found in completions(run(llm, **few, no_repeat_ngram_size=2)):
        assert repeated(free[name], 2) > 0 == repeated(found, 2), name


def test_logits_processors_rule(llm: LLM) -> None:
    def odd(prompt: list[int], output: list[int], logits: Any) -> Any:
        logits[len(output) % 2 :: 2] = float("-inf")
        return logits

    for name, found in completions(run(llm, logits_processors=[odd])):
        assert all(token % 2 != at % 2 for output in found for at, token in enumerate(output.token_ids)), name


def test_logprobs_are_those_of_the_tokens_in_their_places(llm: LLM) -> None:
    """By scoring prompt and output as a prompt."""
    outputs = run(llm, logprobs=2)
    for name, requests in outputs.items():
        for whole, output in ((request, output) for request in requests for output in request.outputs):
            tokens = [*whole.prompt_token_ids, *output.token_ids]
            [scored] = llm.generate([tokens], SamplingParams(max_tokens=1, prompt_logprobs=2), use_tqdm=False)
            assert scored.prompt_logprobs is not None and output.logprobs is not None
            expected = scored.prompt_logprobs[len(whole.prompt_token_ids) :]
            assert len(output.logprobs) == len(expected), name
            for token, table, entries in zip(output.token_ids, output.logprobs, expected, strict=True):
                assert entries is not None and list(table) == list(entries), name
                assert table[token].rank == entries[token].rank, name
                assert all(abs(table[t].logprob - entries[t].logprob) < 1e-4 for t in table), name
            total = sum(table[token].logprob for token, table in zip(output.token_ids, output.logprobs, strict=True))
            assert abs(total - output.cumulative_logprob) < 1e-3, name


def test_chunks_of_the_prompt_and_generations_in_parts_change_nothing(plain: Outputs) -> None:
    small = LLM("demo", **ENGINE | {"max_num_batched_tokens": 12, "max_num_seqs": 8})
    assert shown(run(small)) == shown(plain)
    assert small.engine.stats().steps > 200


def test_a_prefix_from_the_cache_changes_nothing(llm: LLM, plain: Outputs) -> None:
    again = run(llm)
    assert shown(again) == shown(plain)
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    for name, requests in again.items():
        for prompt, request in zip(PROMPTS, requests, strict=True):
            whole = (len(tokenizer.encode(prompt)) - 1) // 16 * 16
            assert request.metrics.cached_tokens >= whole > 0, name


@pytest.mark.parametrize("pressed", [1, 2, 5, 9])
def test_a_preempted_group_ends_as_if_it_had_not_been(llm: LLM, plain: Outputs, pressed: int) -> None:
    """Each group loses all blocks and slots once, a few groups at a time from this step on."""
    engine = llm.engine
    names = list(product(STRATEGIES, range(len(PROMPTS))))
    for name, index in names:
        engine.add_request(f"{name}/{index}", PROMPTS[index], STRATEGIES[name]())
    steps, done = 0, {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        steps += 1
        residents = engine._scheduler.residents
        victims: list[Group] = [group for group in residents.running.values() if not group.preemptions]
        for victim in victims[:9] if steps >= pressed else []:
            residents._preempt(victim)
            engine.check()
    outputs = {name: [done[f"{name}/{index}"] for index in range(len(PROMPTS))] for name in STRATEGIES}
    assert shown(outputs) == shown(plain)
    assert {name for name, found in outputs.items() if any(output.metrics.preemptions for output in found)} == set(STRATEGIES)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_an_abort_at_any_phase_ends_that_request_alone(llm: LLM, plain: Outputs, steps: int) -> None:
    engine = llm.engine
    for name in STRATEGIES:
        engine.add_request(f"aborted {name}", PROMPTS[0], STRATEGIES[name]())
        engine.add_request(f"kept {name}", PROMPTS[1], STRATEGIES[name]())
    last: dict[str, RequestOutput] = {}
    for _ in range(steps):
        last |= {output.request_id: output for output in engine.step()}
    for name in STRATEGIES:
        engine.abort_request(f"aborted {name}")
        engine.check()
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    stats = engine.stats()
    assert stats.free_blocks == stats.num_blocks
    for name in STRATEGIES:
        gone = last[f"aborted {name}"]
        assert gone.finished and {output.finish_reason for output in gone.outputs} == {"abort"}, name
        expected = plain[name][1].outputs
        kept = last[f"kept {name}"].outputs
        assert [output.token_ids for output in kept] == [output.token_ids for output in expected], name


def test_seeds_decide_what_is_drawn(llm: LLM, plain: Outputs) -> None:
    drawn = [name for name, make in STRATEGIES.items() if getattr(make(), "seed", None) is not None]
    params = [STRATEGIES[name](seed=seed) for name in drawn for seed in (7, 7, 8)]
    outputs = llm.generate([PROMPTS[0]] * len(params), params, use_tqdm=False)
    for i, name in enumerate(drawn):
        one, same, other = ([o.token_ids for o in output.outputs] for output in outputs[3 * i : 3 * i + 3])
        assert one == same != other, name


def test_streams_only_grow_and_end_with_the_whole(llm: LLM, plain: Outputs) -> None:
    for name in STRATEGIES:
        steps = stream(llm.engine, PROMPTS[0], STRATEGIES[name]())
        for before, after in pairwise(steps):
            for one, other in zip(before.outputs, after.outputs, strict=True):
                assert other.token_ids[: len(one.token_ids)] == one.token_ids and other.text.startswith(one.text), name
        expected = [output.token_ids for output in plain[name][0].outputs]
        assert [output.token_ids for output in steps[-1].outputs] == expected, name


def stream(engine: LLMEngine, prompt: str, params: Any) -> list[RequestOutput]:
    engine.add_request("stream", prompt, params)
    steps = []
    while engine.has_unfinished_requests():
        steps += engine.step()
    return steps


def test_outputs_are_as_many_as_asked_for_and_ordered(plain: Outputs) -> None:
    for name, requests in plain.items():
        count = getattr(STRATEGIES[name](), "n", 1)
        for request in requests:
            assert [output.index for output in request.outputs] == list(range(count)), name
            scores = [output.score for output in request.outputs if output.score is not None]
            assert scores == sorted(scores, reverse=True), name


def test_alone_and_in_a_batch_of_all_strategies_outputs_are_the_same(llm: LLM, plain: Outputs) -> None:
    alone = {name: [llm.generate([prompt], make(), use_tqdm=False)[0] for prompt in PROMPTS] for name, make in STRATEGIES.items()}
    assert shown(alone) == shown(plain)


COUNTS: dict[str, Callable[[RequestOutput], bool]] = {
    "forward tokens": lambda output: output.metrics.forward_tokens >= 14,
    "a trace": lambda output: output.trace is not None and output.trace.usage.forward_tokens == output.metrics.forward_tokens,
    "no full block copied": lambda output: output.metrics.blocks_copied <= output.metrics.forks,
}


def test_every_request_says_what_it_cost(llm: LLM) -> None:
    outputs = run(llm, trace=True)
    for (name, requests), (count, holds) in product(outputs.items(), COUNTS.items()):
        assert all(holds(request) for request in requests), f"{name}: {count}"
    forked = [name for name in STRATEGIES if name not in ("greedy", "sampling")]
    assert all(request.metrics.forks > 0 for name in forked for request in outputs[name])
    assert all(0 < request.metrics.shared_block_ratio < 1 for name in forked for request in outputs[name])

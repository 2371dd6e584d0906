"""Contrastive search equals what transformers 4.55.4, the last version that has it, was recorded to generate."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import pytest
import torch
from support.recorded import CONFIG, MODELS, digest, fill, load
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from pagefork import LLM, ContrastiveSearchParams, NoTokenError, ParameterError, RequestOutput, SamplingParams
from pagefork.demo import demo_path

RECORDED = load()
NAMES = {"penalty_alpha": "alpha", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
BESIDE = SamplingParams(n=3, temperature=1.5, max_tokens=20, seed=1, ignore_eos=True)
Record = dict[str, Any]


def params(record: Record) -> ContrastiveSearchParams:
    """Our names for the arguments of `generate`; what ends nothing there ends nothing here."""
    settings = {NAMES.get(name, name): value for name, value in record["settings"].items()}
    end = settings.pop("eos_token_id", None)
    return ContrastiveSearchParams(**settings, ignore_eos=True, stop_token_ids=[] if end is None else [end])


def records(name: str) -> list[Record]:
    return [record for record in RECORDED["contrastive"] if record["model"] == name]


@pytest.fixture(scope="module", params=["demo", *MODELS])
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def start(name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LLM]:
    """Starts engines on the model of that name, which is that of the recording."""
    path = demo_path()
    if name in MODELS:
        path = tmp_path_factory.mktemp(name)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG | MODELS[name]))
        fill(model)
        model.save_pretrained(path)
    found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert digest(found) == RECORDED["digests"][name]
    usual: dict[str, Any] = {"dtype": "float32", "hidden_states": True, "num_blocks": 600, "max_num_seqs": 64}
    return lambda **settings: LLM(str(path), **usual | settings)


def generate(llm: LLM, asked: list[Record], beside: int = 0) -> list[RequestOutput]:
    """All records in one batch, with a sampling request after every so many."""
    prompts: list[Any] = []
    wanted: list[Any] = []
    for i, record in enumerate(asked):
        prompts.append(record["prompt"])
        wanted.append(params(record))
        if beside and i % beside == 0:
            prompts.append(record["prompt"])
            wanted.append(BESIDE)
    outputs = llm.generate(prompts, wanted, use_tqdm=False)
    llm.engine.check()
    return [output for output, wish in zip(outputs, wanted, strict=True) if wish is not BESIDE]


def assert_equal(outputs: list[RequestOutput], asked: list[Record]) -> None:
    """No decision that was recorded is a close one, so that nothing is excused."""
    assert min(record["gap"] for record in asked) > 1e-5
    for output, record in zip(outputs, asked, strict=True):
        assert output.error is None, output.error
        assert output.outputs[0].token_ids == record["tokens"], record


def test_tokens_equal_transformers_in_one_batch_with_others(start: Callable[..., LLM], name: str) -> None:
    asked = records(name)[::2]
    assert_equal(generate(start(), asked, beside=3), asked)


def test_tokens_equal_transformers_one_at_a_time(start: Callable[..., LLM], name: str) -> None:
    llm, asked = start(enable_prefix_caching=False), records(name)[::13]
    assert_equal([generate(llm, [record])[0] for record in asked], asked)


def test_tokens_equal_transformers_after_a_chunked_prompt(start: Callable[..., LLM], name: str) -> None:
    """Prompts come in parts of at most 16 tokens, and a generation of 16 candidates fills a step."""
    asked = records(name)[1::6]
    llm = start(max_num_batched_tokens=20, block_size=4, num_blocks=2000)
    assert_equal(generate(llm, asked, beside=4), asked)


def test_tokens_equal_transformers_on_a_prefix_hit(start: Callable[..., LLM], name: str) -> None:
    """The similarities to cached positions are those to computed ones, whoever computed them."""
    llm = start(block_size=2, num_blocks=4000)
    asked = records(name)[3::6]
    greedy = SamplingParams(temperature=0, max_tokens=1)
    llm.generate([record["prompt"] for record in asked], greedy, use_tqdm=False)
    outputs = generate(llm, asked)
    assert_equal(outputs, asked)
    assert all(output.metrics.cached_tokens == (len(output.prompt_token_ids) - 1) // 2 * 2 for output in outputs)
    assert sum(output.metrics.cached_tokens > 0 for output in outputs) > len(outputs) // 2


def test_tokens_equal_transformers_after_preemption(start: Callable[..., LLM], name: str) -> None:
    llm, asked = start(num_blocks=64, block_size=4), records(name)[5::6]
    outputs = generate(llm, asked, beside=5)
    assert_equal(outputs, asked)
    assert sum(output.metrics.preemptions for output in outputs) > 0


def test_log_probs_are_the_models_own(start: Callable[..., LLM], name: str) -> None:
    """Of the chosen token, and with rank and most probable ones; compared with a forward pass over the output."""
    asked = records(name)[::13]
    llm = start()
    wanted = [params(record).replace(logprobs=4) for record in asked]
    outputs = llm.generate([record["prompt"] for record in asked], wanted, use_tqdm=False)
    path = llm.engine.config.model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for output, record in zip(outputs, asked, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == record["tokens"] and completion.logprobs is not None
        ids = torch.tensor([record["prompt"] + record["tokens"]])
        with torch.no_grad():
            logps = model(ids).logits[0, len(record["prompt"]) - 1 : -1].log_softmax(-1)
        for token, table, row in zip(completion.token_ids, completion.logprobs, logps, strict=True):
            assert table[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert table[token].rank == int((row > row[token]).sum()) + 1
            best = row.topk(4)
            assert set(best.indices.tolist()) <= set(table)
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                assert table[other].logprob == pytest.approx(value, abs=1e-4)
        assert completion.cumulative_logprob == pytest.approx(
            sum(float(row[token]) for token, row in zip(record["tokens"], logps, strict=True)), abs=1e-2
        )


def test_nothing_has_to_follow_a_candidate_that_loses_or_ends_the_output(start: Callable[..., LLM]) -> None:
    """Two allowed tokens, none twice: two tokens can be generated, and a third can't, as when decoding greedily."""
    llm = start()
    bans: dict[str, Any] = {"allowed_token_ids": [7, 9], "no_repeat_ngram_size": 1, "ignore_eos": True}
    for count in (2, 3):
        greedy, *searched = llm.generate(
            [[5, 6]] * 3,
            [
                SamplingParams(temperature=0, max_tokens=count, **bans),
                ContrastiveSearchParams(alpha=0, top_k=2, max_tokens=count, **bans),
                ContrastiveSearchParams(top_k=5, max_tokens=count, **bans),
            ],
            use_tqdm=False,
        )
        for output in searched:
            tokens = output.outputs[0].token_ids
            assert tokens == (greedy if output is searched[0] else output).outputs[0].token_ids[: len(tokens)]
            assert set(tokens) == {7, 9} or count == 3
            assert output.outputs[0].finish_reason == ("length" if count == 2 else "error")
            assert isinstance(output.error, NoTokenError if count == 3 else NoneType)
    llm.engine.check()


def test_engines_without_hidden_states_refuse_it(start: Callable[..., LLM]) -> None:
    with pytest.raises(ParameterError, match="hidden_states=True"):
        start(hidden_states=False).generate([[5, 6]], ContrastiveSearchParams(), use_tqdm=False)

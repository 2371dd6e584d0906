"""LLM.generate on the demo model: what a user passes in, and what comes back."""

from __future__ import annotations

import math
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.tokenizers import backend, save

from pagefork import LLM, ConfigError, InvalidRequestError, LLMEngine, ModelError, PageforkError, SamplingParams
from pagefork.scheduler.strategies.sampling import Candidate

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = ["def add(a, b):\n", "import ", "class Stack:\n    def push(self, "]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(demo: LLM) -> Any:
    yield
    demo.engine.check()
    stats = demo.engine.stats()
    assert stats.free_blocks == stats.num_blocks and not stats.num_running and not stats.num_waiting


def run(demo: LLM, prompts: Any, params: Any = GREEDY) -> Any:
    return demo.generate(prompts, params, use_tqdm=False)


def test_outputs_come_in_the_order_of_the_prompts_whatever_their_lengths(demo: LLM) -> None:
    lengths = [9, 1, 5]
    outputs = run(demo, PROMPTS, [SamplingParams(temperature=0, max_tokens=n) for n in lengths])
    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


def test_a_text_token_ids_and_lists_of_either_are_the_same_prompt(demo: LLM) -> None:
    assert demo.engine.tokenizer is not None
    ids = demo.engine.tokenizer.encode(PROMPTS[0])
    forms: list[Any] = [PROMPTS[0], [PROMPTS[0]], ids, [ids], tuple(ids), np.array(ids), [np.array(ids)], torch.tensor(ids)]
    texts = {run(demo, form)[0].outputs[0].text for form in forms}
    assert len(texts) == 1
    assert run(demo, ids)[0].prompt is None
    mixed = run(demo, [PROMPTS[0], ids])
    assert mixed[0].outputs[0].token_ids == mixed[1].outputs[0].token_ids


def test_the_empty_prompt_starts_from_the_end_of_text_token(demo: LLM) -> None:
    output = run(demo, "")[0]
    assert output.prompt_token_ids == [0]
    assert output.outputs[0].token_ids == run(demo, [[0]])[0].outputs[0].token_ids


def test_n_outputs_differ_and_the_first_is_that_of_n_1(demo: LLM) -> None:
    params = SamplingParams(n=4, seed=7, max_tokens=12)
    four = run(demo, PROMPTS[0], params)[0].outputs
    assert [output.index for output in four] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in four}) == 4
    assert run(demo, PROMPTS[0], params.replace(n=1))[0].outputs[0].token_ids == four[0].token_ids
    assert [o.token_ids for o in run(demo, PROMPTS[0], params)[0].outputs] == [o.token_ids for o in four]


def test_best_of_returns_the_best_by_mean_log_prob(demo: LLM) -> None:
    every = run(demo, PROMPTS[0], SamplingParams(n=6, seed=3, max_tokens=12))[0].outputs
    means = sorted((o.cumulative_logprob / len(o.token_ids) for o in every), reverse=True)
    best = run(demo, PROMPTS[0], SamplingParams(n=2, best_of=6, seed=3, max_tokens=12))[0].outputs
    assert [output.score for output in best] == pytest.approx(means[:2], abs=1e-5)
    assert {tuple(o.token_ids) for o in best} <= {tuple(o.token_ids) for o in every}


def test_rank_by_sees_the_text_and_decides(demo: LLM) -> None:
    def shortest(candidate: Candidate) -> float:
        return -len(candidate.text)

    params = SamplingParams(n=1, best_of=5, seed=3, max_tokens=12, rank_by=shortest)
    every = run(demo, PROMPTS[0], SamplingParams(n=5, seed=3, max_tokens=12))[0].outputs
    assert len(run(demo, PROMPTS[0], params)[0].outputs[0].text) == min(len(output.text) for output in every)


def test_a_rank_by_that_raises_fails_its_request_alone(demo: LLM) -> None:
    params = [SamplingParams(best_of=2, max_tokens=4, rank_by=lambda candidate: 1 / 0), GREEDY]
    failed, fine = run(demo, PROMPTS[:2], params)
    assert failed.outputs[0].finish_reason == "error" and "ZeroDivisionError" in str(failed.error)
    assert isinstance(failed.error, PageforkError)
    assert fine.error is None and len(fine.outputs[0].token_ids) == 12


def test_a_stop_text_ends_the_output_before_it_or_after_it(demo: LLM) -> None:
    text = run(demo, PROMPTS[0])[0].outputs[0].text
    stop = text[4:7]
    ended = run(demo, PROMPTS[0], GREEDY.replace(stop=[stop]))[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert ended.text == text[: text.find(stop)]
    kept = run(demo, PROMPTS[0], GREEDY.replace(stop=stop, include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == text[: text.find(stop) + len(stop)]


def test_stop_token_ids_end_tokens_and_min_tokens(demo: LLM) -> None:
    tokens = run(demo, PROMPTS[0])[0].outputs[0].token_ids
    stop = tokens[5]
    ended = run(demo, PROMPTS[0], GREEDY.replace(stop_token_ids=[stop]))[0].outputs[0]
    assert ended.token_ids == tokens[: tokens.index(stop) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    longer = run(demo, PROMPTS[0], GREEDY.replace(stop_token_ids=[stop], min_tokens=10))[0].outputs[0]
    assert stop not in longer.token_ids[:9] and len(longer.token_ids) >= 10
    only_end = GREEDY.replace(allowed_token_ids=[0])
    end = run(demo, PROMPTS[0], only_end)[0].outputs[0]
    assert (end.token_ids, end.finish_reason, end.stop_reason, end.text) == ([0], "stop", None, "")
    assert run(demo, PROMPTS[0], only_end.replace(ignore_eos=True))[0].outputs[0].token_ids == [0] * 12
    shown = run(demo, PROMPTS[0], only_end.replace(skip_special_tokens=False))[0].outputs[0]
    assert shown.text == "<|endoftext|>"


def test_bans_bias_and_ngrams_show_in_the_tokens(demo: LLM) -> None:
    plain = run(demo, PROMPTS[0], GREEDY.replace(max_tokens=40))[0].outputs[0]
    assert len(set(pairwise(plain.token_ids))) < 39
    fresh = run(demo, PROMPTS[0], GREEDY.replace(max_tokens=40, no_repeat_ngram_size=2))[0]
    tokens = fresh.prompt_token_ids + fresh.outputs[0].token_ids
    pairs = list(pairwise(tokens))
    assert len(set(pairs)) == len(pairs)
    forced = run(demo, PROMPTS[0], GREEDY.replace(logit_bias={77: 100.0}))[0].outputs[0]
    assert forced.token_ids == [77] * 12
    assert demo.engine.tokenizer is not None
    plain = run(demo, PROMPTS[2], GREEDY)[0].outputs[0]
    for length in (1, 2):  # a word of one token, and one whose last token is banned only after the first
        parts = [plain.token_ids[i : i + length] for i in range(12 - length)]
        words = [demo.engine.tokenizer.decode(part) for part in parts]
        part, word = next(
            pair for pair in zip(parts, words, strict=True) if demo.engine.tokenizer.encode_plain(pair[1]) == pair[0]
        )
        banned = run(demo, PROMPTS[2], GREEDY.replace(max_tokens=40, bad_words=[word]))[0].outputs[0].token_ids
        assert not _contains(banned, part)


def _contains(tokens: list[int], part: list[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens)))


def test_logprobs_are_those_of_the_tokens(demo: LLM) -> None:
    output = run(demo, PROMPTS[0], SamplingParams(seed=1, max_tokens=8, logprobs=3))[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 8
    for token, table in zip(output.token_ids, output.logprobs, strict=True):
        assert 3 <= len(table) <= 4 and table[token].rank is not None
        ranked = sorted(table.values(), key=lambda entry: -entry.logprob)
        assert [entry.rank for entry in ranked[:3]] == [1, 2, 3]
    assert output.cumulative_logprob == pytest.approx(
        sum(table[token].logprob for token, table in zip(output.token_ids, output.logprobs, strict=True)), abs=1e-4
    )
    chosen = run(demo, PROMPTS[0], SamplingParams(seed=1, max_tokens=8, logprobs=0))[0].outputs[0].logprobs
    assert chosen is not None and [list(table) for table in chosen] == [[token] for token in output.token_ids]
    whole = run(demo, PROMPTS[0], SamplingParams(seed=1, max_tokens=1, logprobs=-1))[0].outputs[0].logprobs
    assert whole is not None and len(whole[0]) == 4096
    assert run(demo, PROMPTS[0], SamplingParams(seed=1, max_tokens=1, logprobs=10**9))[0].outputs[0].logprobs == whole
    assert math.fsum(math.exp(entry.logprob) for entry in whole[0].values()) == pytest.approx(1, abs=1e-4)


def test_params_none_means_the_models_generation_config(demo: LLM) -> None:
    params = demo.default_params()
    assert isinstance(params, SamplingParams) and params.greedy
    assert (
        run(demo, PROMPTS[0], None)[0].outputs[0].token_ids
        == run(demo, PROMPTS[0])[0].outputs[0].token_ids[:12]
        + (run(demo, PROMPTS[0], SamplingParams(temperature=0))[0].outputs[0].token_ids[12:])
    )


def test_max_tokens_none_runs_to_max_model_len(demo: LLM) -> None:
    output = run(demo, [[5] * 1000], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 24 and output.outputs[0].finish_reason == "length"


BAD: list[tuple[Any, Any, str]] = [
    ([], GREEDY, "prompts is empty"),
    ([[]], GREEDY, "empty list of token ids"),
    (3, GREEDY, "prompts must be a text, token ids or a list of either, got int"),
    ([3.5], GREEDY, "a prompt is a text or a list of token ids, got float"),
    ({"prompt": "def"}, GREEDY, "prompts must be a text, token ids or a list of either, got dict"),
    (b"abc", GREEDY, "or a list of either, got bytes"),
    ([b"abc"], GREEDY, "a text or a list of token ids, got bytes"),
    ([{1, 2}], GREEDY, "a text or a list of token ids, got set"),
    ([np.array([1.7])], GREEDY, "the prompt holds 1.7"),
    ([[np.float32(1)]], GREEDY, "a list prompt holds token ids"),
    ([[True]], GREEDY, "the prompt holds True"),
    ("a", GREEDY.replace(bad_words=["\ud800"]), r"'\\ud800' is not valid Unicode"),
    ("a", GREEDY.replace(allowed_token_ids=[0], min_tokens=1), "allowed_token_ids has no other"),
    ([["a"]], GREEDY, "the prompt holds 'a'"),
    ([[4096]], GREEDY, "token id 4096; the model's ids go from 0 to 4095"),
    ([[-1]], GREEDY, "token id -1"),
    ([[1] * 1024], GREEDY, "has 1024 tokens; max_model_len=1024 allows at most 1023"),
    (["a", "b"], [GREEDY], "1 sampling_params for 2 prompts"),
    ("a", "greedy", "params must be SamplingParams or those of another strategy, got str"),
    ("a", GREEDY.replace(stop_token_ids=[5000]), "stop_token_ids has token id 5000"),
    ("a", GREEDY.replace(logit_bias={5000: 1.0}), "logit_bias has token id 5000"),
    ("a", GREEDY.replace(allowed_token_ids=[5000]), "allowed_token_ids has token id 5000"),
    ("a", SamplingParams(n=65), "65 sequences at once were asked for; max_num_seqs allows 64"),
    ("a", SamplingParams(n=10**9), "1000000000 sequences at once were asked for"),
    ([[1] * 1020], SamplingParams(max_tokens=20, min_tokens=10), "leave room for 4"),
    ("\ud800", GREEDY, "not valid Unicode"),
]


@pytest.mark.parametrize(("prompts", "params", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_refused_before_anything_runs(demo: LLM, prompts: Any, params: Any, message: str) -> None:
    steps = demo.engine.stats().steps
    with pytest.raises(InvalidRequestError, match=message.replace("(", r"\(")) as caught:
        run(demo, prompts, params)
    assert isinstance(caught.value, ValueError)
    assert demo.engine.stats().steps == steps


def test_one_bad_prompt_refuses_the_call_and_leaves_the_engine_as_it_was(demo: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="4096"):
        run(demo, [PROMPTS[0], [4096]])
    assert not demo.engine.has_unfinished_requests()
    assert run(demo, PROMPTS[0])[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_memory_utilization": 0.9}, "no setting 'gpu_memory_utilization'; here it is called kv_cache_memory"),
        ({"block_sise": 16}, "no setting 'block_sise'; it has model"),
        ({"block_size": 0}, "block_size=0 is refused"),
        ({"dtype": "int3"}, "dtype='int3' is refused"),
        ({"max_model_len": 2048}, "max_model_len=2048: the model was made for at most 1024"),
        ({"max_model_len": 512, "num_blocks": 8}, "max_model_len=512 does not fit in the cache of 128 tokens"),
        ({"kv_cache_memory": 1000}, "kv_cache_memory=1000"),
        ({"num_blocks": 999_999_999}, "a cache of 1000000000 blocks takes .* bytes, more than there are"),
        ({"kv_cache_memory": 10**14}, "blocks takes .* bytes, more than there are"),
        ({"max_num_seqs": 10**9}, "max_num_seqs=1000000000 is refused"),
        ({"num_threads": 10**12}, "num_threads=1000000000000 is refused"),
        ({"max_model_len": 10**30}, "max_model_len=.* is refused"),
        ({"device": "cuda"}, "no CUDA device here"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=message):
        LLM("demo", **settings)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/directory", "there is no such directory"),
        ("./nowhere", "no such directory"),
        ("pyproject.toml", "is a file|no directory"),
    ],
)
def test_a_model_that_is_not_there_is_an_error(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        LLM(model)


def test_ctrl_c_aborts_the_call_and_leaves_the_engine_usable(demo: LLM) -> None:
    before = run(demo, PROMPTS[0])[0].outputs[0].token_ids
    forward = demo.engine._runner._model.forward

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return forward(*args)

    demo.engine._runner._model.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(demo, PROMPTS)
    demo.engine._runner._model.forward = forward  # type: ignore[method-assign]
    assert not demo.engine.has_unfinished_requests()
    assert run(demo, PROMPTS[0])[0].outputs[0].token_ids == before


@pytest.mark.parametrize("kind", ["across_characters", "llama2", "unigram_bytes", "word_piece", "suffixes"])
def test_a_text_that_was_shown_only_grows_and_ends_as_the_decoded_tokens(kind: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, vocab_size=backend(kind).get_vocab_size(), num_hidden_layers=1, hidden_size=32, eos_token_id=None)
    save(backend(kind), tmp_path, clean_up_tokenization_spaces=True)
    llm = LLM(str(tmp_path), num_blocks=64)
    for stop in ([], ["e", " t", "\n"]):
        params = SamplingParams(n=8, max_tokens=60, seed=1, stop=stop, temperature=2.0, skip_special_tokens=not stop)
        llm.engine.add_request("a", "the", params)
        shown = [""] * 8
        while llm.engine.has_unfinished_requests():
            for output in llm.engine.step():
                for completion in output.outputs:
                    assert completion.text.startswith(shown[completion.index])
                    shown[completion.index] = completion.text
        for completion in output.outputs:
            assert llm.engine.tokenizer is not None
            whole = llm.engine.tokenizer.decode(completion.token_ids, params.skip_special_tokens)
            found = [whole.find(text) for text in stop if text in whole]
            if "\ufffd" not in whole or kind == "across_characters":
                assert completion.text == (whole[: min(found)] if found and completion.finish_reason == "stop" else whole)


def test_requests_added_to_the_engine_survive_a_generate_call(demo: LLM) -> None:
    demo.engine.add_request("mine", PROMPTS[1], GREEDY)
    run(demo, PROMPTS[0], GREEDY.replace(max_tokens=20))
    found = {}
    while demo.engine.has_unfinished_requests():
        found.update({output.request_id: output for output in demo.engine.step()})
    assert found["mine"].finished and len(found["mine"].outputs[0].token_ids) == 12


def test_numbers_that_name_requests_of_the_engine_are_left_to_them() -> None:
    llm = LLM("demo", num_blocks=64)
    for number in "13":
        llm.engine.add_request(number, PROMPTS[1], GREEDY)
    llm.engine.abort_request("3")
    assert [output.request_id for output in run(llm, PROMPTS)] == ["0", "2", "4"]
    found = {}
    while llm.engine.has_unfinished_requests():
        found.update({output.request_id: output for output in llm.engine.step()})
    assert {name: output.outputs[0].finish_reason for name, output in found.items()} == {"1": "length", "3": "abort"}


def test_a_request_larger_than_the_cache_is_refused() -> None:
    llm = LLM("demo", num_blocks=4)
    assert llm.engine.max_model_len == 64
    with pytest.raises(InvalidRequestError, match="max_model_len=64 allows at most 63"):
        llm.generate([[1] * 64], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="needs 6 cache blocks of 16 tokens; the cache has 4"):
        llm.generate([[1] * 60], SamplingParams(n=2), use_tqdm=False)


def test_tokens_that_the_model_does_not_have_are_refused_wherever_they_come_from(tmp_path: Path) -> None:
    known = backend("llama2")
    make_checkpoint(tmp_path, vocab_size=known.get_vocab_size() - 2, bos_token_id=100_000, eos_token_id=-1)
    save(known, tmp_path)
    llm = LLM(str(tmp_path), num_blocks=32)
    unknown = known.id_to_token(known.get_vocab_size() - 1)
    with pytest.raises(InvalidRequestError, match="the prompt has token id"):
        llm.generate(f"a{unknown}", GREEDY, use_tqdm=False)
    outputs = llm.generate([[5, 6]] * 2, [GREEDY.replace(min_tokens=2), GREEDY], use_tqdm=False)
    assert [output.error for output in outputs] == [None, None]


def test_the_engine_refuses_what_is_no_config() -> None:
    with pytest.raises(ConfigError, match="takes an EngineConfig, got str"):
        LLMEngine("demo")  # type: ignore[arg-type]

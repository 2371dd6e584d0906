"""Beam search in a batch of everything finds what transformers' generate finds for each prompt alone, with the same scores."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.checkpoints import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pagefork import LLM, BeamSearchParams, ParameterError, SamplingParams
from pagefork.demo import demo_path
from pagefork.outputs import RequestOutput

VOCAB = 61
COMBINATIONS = 300
CLOSE = 1e-5  # log-probs; also the gap, per token, below which another choice is excused


class Case(NamedTuple):
    """One setting in both languages."""

    prompt: list[int]
    params: BeamSearchParams
    theirs: dict[str, Any]


Found = list[tuple[list[int], float | None]]  # outputs: tokens and score


def draw_case(rng: random.Random) -> Case:
    width = rng.choice([1, 2, 3, 4, 8])
    n = rng.randint(1, width)
    length, shortest = rng.choice([1, 5, 20, 20]), 0
    ends = rng.sample(range(VOCAB), rng.choice([0, 1, 1, 2, 3]))
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if ends:
        shortest = min(length, rng.choice([0, 0, 3]))
        theirs |= {"eos_token_id": ends, "min_new_tokens": shortest}
    if width > 1:
        ours["length_penalty"] = theirs["length_penalty"] = rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0])
        ours["early_stopping"] = theirs["early_stopping"] = rng.choice([False, True, "never"])
        if rng.random() < 0.3:  # without beams theirs divides logits, not log-probs
            ours["repetition_penalty"] = theirs["repetition_penalty"] = rng.choice([0.8, 1.3])
    if rng.random() < 0.3:
        ours["no_repeat_ngram_size"] = theirs["no_repeat_ngram_size"] = rng.choice([1, 2, 3])
    if rng.random() < 0.2:
        banned = rng.sample(sorted(set(range(VOCAB)) - set(ends)), 20)
        ours["allowed_token_ids"] = sorted(set(range(VOCAB)) - set(banned))
        theirs["suppress_tokens"] = banned
    if rng.random() < 0.5:  # ends come often enough to fill the pool early
        ours["logit_bias"] = {token: rng.uniform(-1, 4) for token in ends or rng.sample(range(VOCAB), 3)}
        theirs["sequence_bias"] = {(token,): bias for token, bias in ours["logit_bias"].items()}
    params = BeamSearchParams(
        beam_width=width, n=n, max_tokens=length, min_tokens=shortest, stop_token_ids=ends, ignore_eos=True, **ours
    )
    theirs |= {"num_beams": width, "num_return_sequences": n, "max_new_tokens": length}
    return Case([rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 16, 17, 40]))], params, theirs)


def transformers_finds(model: PreTrainedModel, prompt: list[int], **settings: Any) -> Found:
    """The outputs for one prompt alone; without beams there is one, and no score."""
    settings |= {"pad_token_id": 0, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}  # for scores and lengths
    if settings["num_beams"] == 1:
        settings["num_return_sequences"] = 1
    ids = torch.tensor([prompt])
    found: Any = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # type: ignore[operator]
    rows = found.sequences[:, len(prompt) :].tolist()
    if settings["num_beams"] == 1:
        return [(rows[0], None)]
    lengths = (found.beam_indices >= 0).sum(1).tolist()
    return [(row[:length], score) for row, length, score in zip(rows, lengths, found.sequences_scores.tolist(), strict=True)]


def found_by(result: RequestOutput) -> Found:
    assert result.error is None
    return [(output.token_ids, output.score) for output in result.outputs]


def excused(ours: Found, theirs: Found, length_penalty: float = 1.0) -> bool:
    """Whether other tokens were found whose log-probs have the same sum; False where the tokens are the same.

    The sums behind the scores must be the same to CLOSE per token, and once more for the prompt.
    """
    assert len(ours) == len(theirs)
    for (tokens, score), (others, other) in zip(ours, theirs, strict=True):
        if score is None or other is None:
            assert tokens == others
        else:
            sums = score * len(tokens) ** length_penalty, other * len(others) ** length_penalty
            assert sums[0] == pytest.approx(sums[1], abs=CLOSE * (1 + len(others)))
    return [tokens for tokens, _ in ours] != [tokens for tokens, _ in theirs]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("small")
    model = make_checkpoint(path, vocab_size=VOCAB, max_position_embeddings=128)
    model.generation_config.eos_token_id = None
    return path, model


def test_every_setting_finds_what_transformers_finds(pair: tuple[Path, PreTrainedModel]) -> None:
    path, model = pair
    rng = random.Random(0)
    cases = [draw_case(rng) for _ in range(COMBINATIONS)]
    llm = LLM(str(path), dtype="float32", num_blocks=700, max_num_seqs=64, max_num_batched_tokens=128)
    sampling = SamplingParams(temperature=1.0, max_tokens=20, n=3, seed=1, ignore_eos=True)
    prompts = [prompt for case in cases for prompt in (case.prompt, case.prompt[:5])]
    settings = [params for case in cases for params in (case.params, sampling)]
    results = llm.generate(prompts, settings, use_tqdm=False)[::2]
    llm.engine.check()
    excuses, ended = 0, 0
    for case, result in zip(cases, results, strict=True):
        theirs = transformers_finds(model, case.prompt, **case.theirs)
        excuses += excused(found_by(result), theirs, case.params.length_penalty)
        ended += sum(output.finish_reason == "stop" for output in result.outputs)
    assert excuses <= 1
    assert ended > COMBINATIONS // 3


def test_too_few_possible_outputs_repeat_the_last_one(pair: tuple[Path, PreTrainedModel]) -> None:
    llm = LLM(str(pair[0]), dtype="float32", num_blocks=50)
    params = BeamSearchParams(beam_width=6, n=6, max_tokens=2, allowed_token_ids=[5, 9], ignore_eos=True)
    outputs = llm.generate([[7, 8]], params, use_tqdm=False)[0].outputs
    tokens = [tuple(output.token_ids) for output in outputs]
    assert sorted(tokens[:4]) == [(5, 5), (5, 9), (9, 5), (9, 9)] and tokens[4:] == [tokens[3]] * 2
    llm.engine.check()


PROMPTS = ["def add(a, b):\n", "import ", "class Node:\n    def __init__(self", "# a list of primes\n"]


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)


def test_the_demo_model_finds_what_transformers_finds(demo: LLM, theirs: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    for early_stopping in (False, True):
        params = BeamSearchParams(beam_width=4, n=4, max_tokens=32, early_stopping=early_stopping)
        results = demo.generate(PROMPTS, params, use_tqdm=False)
        for prompt, result in zip(PROMPTS, results, strict=True):
            assert result.prompt_token_ids == tokenizer(prompt)["input_ids"]
            settings = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 32, "early_stopping": early_stopping}
            assert not excused(found_by(result), transformers_finds(theirs, result.prompt_token_ids, **settings))


def test_stop_texts_end_hypotheses_as_those_of_transformers_do(demo: LLM, theirs: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    stop = ["return", "):", " as"]
    params = BeamSearchParams(beam_width=4, n=4, max_tokens=24, stop=stop)
    results = demo.generate(PROMPTS, params, use_tqdm=False)
    settings = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 24, "stop_strings": stop, "tokenizer": tokenizer}
    for result in results:
        assert not excused(found_by(result), transformers_finds(theirs, result.prompt_token_ids, **settings))
    reasons = [output.stop_reason for result in results for output in result.outputs]
    assert set(reasons) & set(stop)


def test_a_wide_search_gives_everything_back() -> None:
    llm = LLM("demo", dtype="float32", num_blocks=2400, max_num_seqs=512, max_num_batched_tokens=1024)
    free = llm.engine.stats().free_blocks
    params = BeamSearchParams(beam_width=512, n=512, max_tokens=64, logprobs=0)
    result = llm.generate(["def "], params, use_tqdm=False)[0]
    llm.engine.check()
    assert llm.engine.stats().free_blocks == free
    scores = [output.score or 0.0 for output in result.outputs]
    assert scores == sorted(scores, reverse=True) and len({tuple(output.token_ids) for output in result.outputs}) == 512
    for output in result.outputs:
        assert output.score == pytest.approx(output.cumulative_logprob / len(output.token_ids), abs=CLOSE)


def test_a_width_of_one_reports_what_greedy_reports(demo: LLM) -> None:
    narrow = BeamSearchParams(beam_width=1, max_tokens=20, logprobs=2)
    greedy = SamplingParams(temperature=0, max_tokens=20, logprobs=2)
    results = demo.generate([PROMPTS[0]] * 2, [narrow, greedy], use_tqdm=False)
    one, other = (result.outputs[0] for result in results)
    assert one.token_ids == other.token_ids and one.text == other.text and one.finish_reason == other.finish_reason
    for found, expected in zip(one.logprobs or [], other.logprobs or [], strict=True):
        assert found.keys() == expected.keys()
        for token, logprob in found.items():
            assert logprob.logprob == pytest.approx(expected[token].logprob, abs=CLOSE)
            assert (logprob.rank, logprob.decoded_token) == (expected[token].rank, expected[token].decoded_token)


def test_a_width_of_one_is_greedy_whatever_is_processed(demo: LLM) -> None:
    prompts = ["def add(a, b):\n", "import os\n", "class Node:\n    "]
    settings: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.9, "no_repeat_ngram_size": 3, "logit_bias": {300: 2.0}},
        {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    ]
    for fields in settings:
        greedy = demo.generate(prompts, SamplingParams(temperature=0, max_tokens=24, **fields), use_tqdm=False)
        beams = demo.generate(prompts, BeamSearchParams(beam_width=1, max_tokens=24, **fields), use_tqdm=False)
        assert [o.outputs[0].token_ids for o in beams] == [o.outputs[0].token_ids for o in greedy], fields


@pytest.mark.parametrize("fields", [{"logit_bias": {5: 3e38}}, {"num_beam_groups": 2, "diversity_penalty": 1e37}], ids=str)
def test_scores_that_leave_single_precision_are_refused(demo: LLM, fields: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="leaves single precision within 6 tokens"):
        demo.generate(["a"], BeamSearchParams(max_tokens=6, **fields), use_tqdm=False)

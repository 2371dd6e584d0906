"""`pagefork explain --next`: what it says of a distribution is what float64 and transformers say, and what is drawn from."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from support.cli import COMMAND, PROMPT, assert_refused, generated, pagefork
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import MinPLogitsWarper

from pagefork import LLM
from pagefork.cli.next_token import SETTINGS, columns, logits_of
from pagefork.outputs import Logprob


def test_the_table_of_five_logits_is_that_of_the_textbook() -> None:
    found = {column.name: column for column in columns(torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]))}
    np.testing.assert_allclose(found["temp 1"].probabilities, [0.636, 0.234, 0.086, 0.032, 0.012], atol=0.0005)
    np.testing.assert_allclose(found["temp 2"].probabilities.sum(), 1, rtol=1e-12)
    assert found["top-p 0.9"].is_kept.tolist() == [True, True, True, False, False]  # .870 is not enough
    assert found["min-p 0.1"].is_kept.tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(found["top-p 0.9"].probabilities[:3], np.array([0.636, 0.234, 0.086]) / 0.956, atol=0.0005)


@pytest.mark.parametrize("shift", [0.0, -7.5])
def test_columns_are_those_of_float64_and_the_warpers_of_transformers_up_to_a_constant(shift: float) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 3
    stages: dict[str, Any] = {
        **{f"temp {heat:g}": TemperatureLogitsWarper(heat) for heat in (0.1, 0.5, 2.0)},
        "temp 1": lambda _, scores: scores,
        "top-k 5": TopKLogitsWarper(5),
        "top-p 0.9": TopPLogitsWarper(0.9),
        "min-p 0.1": MinPLogitsWarper(0.1),
    }
    for column in columns(logits + shift):
        kept = stages.pop(column.name)(None, logits.double()[None])[0]
        expected = torch.softmax(kept, -1).numpy()
        assert column.is_kept.tolist() == (kept > -math.inf).tolist()
        assert column.kept == np.count_nonzero(kept > -math.inf)
        np.testing.assert_allclose(column.probabilities, expected, rtol=2e-5, atol=1e-12)
        nonzero = expected[expected > 0]
        assert column.entropy == pytest.approx(-(nonzero * np.log2(nonzero)).sum(), rel=1e-4, abs=1e-7)
    assert not stages


def test_logits_come_back_in_the_order_of_the_vocabulary() -> None:
    assert logits_of({2: Logprob(-1.0), 0: Logprob(-2.0)}).tolist() == [-2.0, -math.inf, -1.0]


def explained(*arguments: str) -> dict[str, Any]:
    done = pagefork("explain", "--json", *arguments, "--next", PROMPT)
    assert (done.code, done.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_raw_column_is_the_distribution_of_the_model(demo: LLM) -> None:
    answer = explained("--top", "4096", "--dtype", "float32")
    [output] = demo.generate(PROMPT, demo.default_params().replace(max_tokens=1, logprobs=-1), use_tqdm=False)
    expected = (output.outputs[0].logprobs or [])[0]
    assert len(answer["tokens"]) == len(expected) == 4096
    for token in answer["tokens"]:
        assert token["text"] == expected[token["token_id"]].decoded_token
        assert token["probabilities"]["temp 1"] == pytest.approx(math.exp(expected[token["token_id"]].logprob), rel=1e-4)
    assert [setting["name"] for setting in answer["settings"]] == [setting.name for setting in SETTINGS]
    logprobs = [token["logprob"] for token in answer["tokens"]]
    assert logprobs == sorted(logprobs, reverse=True)


def test_the_column_of_the_flags_goes_through_the_whole_pipeline() -> None:
    banned = explained()["tokens"][0]["token_id"]
    flags = ["--temperature", "0.5", "--top-k", "20", "--logit-bias", f"{banned}=-100", "--repetition-penalty", "1.3"]
    answer = explained(*flags, "--top", "4096")
    chances = {token["token_id"]: token["probabilities"]["given flags"] for token in answer["tokens"]}
    [request] = generated(*flags, "--max-tokens", "1", "--logprobs", "-1", "--logprobs-mode", "processed", PROMPT)
    expected = {
        int(token): math.exp(entry["logprob"])
        for token, entry in request["outputs"][0]["logprobs"][0].items()
        if entry["logprob"] is not None
    }
    entropy = sum(-chance * math.log2(chance) for chance in expected.values() if chance)
    assert answer["settings"][-1] == {"name": "given flags", "kept": 20, "entropy_bits": pytest.approx(entropy, rel=1e-4)}
    assert chances[banned] == 0
    assert {token for token, chance in chances.items() if chance} == {token for token, chance in expected.items() if chance}
    for token, chance in expected.items():
        assert chances[token] == pytest.approx(chance, rel=1e-4)


def test_min_tokens_bans_the_end_tokens_however_many_they_are() -> None:
    answers = [explained("--min-tokens", count, "--top", "4096") for count in ("0", "1", "20", "5000")]
    free, *banned = ([token["probabilities"]["given flags"] for token in answer["tokens"]] for answer in answers)
    assert banned[0] == banned[1] == banned[2] != free
    assert [setting["kept"] for setting in (answers[0]["settings"][-1], answers[2]["settings"][-1])] == [4096, 4095]


def test_greedy_flags_keep_the_token_that_is_generated() -> None:
    flags = ["--temperature", "0", "--repetition-penalty", "1.5"]
    [token] = generated(*flags, "--max-tokens", "1", PROMPT)[0]["outputs"][0]["token_ids"]
    answer = explained(*flags, "--top", "4096")
    assert [t["token_id"] for t in answer["tokens"] if t["probabilities"]["given flags"]] == [token]
    assert (answer["settings"][-1]["kept"], answer["settings"][-1]["entropy_bits"]) == (1, 0)


@pytest.mark.parametrize("columns", ["80", "40"])
def test_the_table_fits_the_width_and_says_what_json_says(columns: str) -> None:
    flags = ["--top", "30", "--temperature", "0.7", "--top-p", "0.8"]
    done = pagefork("explain", *flags, "--next", PROMPT, COLUMNS=columns)
    lines = done.stdout.splitlines()
    assert max(map(len, lines[1:])) <= int(columns)
    assert "\x1b" not in done.stdout
    if columns == "80":
        assert len(lines) == 1 + 2 + 1 + 30 + 1 + 2
        settings = explained(*flags)["settings"]
        assert lines[-2].split()[2:] == [str(setting["kept"]) for setting in settings]
        assert lines[-1].split()[1:] == [f"{setting['entropy_bits']:.2f}" for setting in settings]
        assert "-" in lines[-4].split()


def test_a_hostile_prompt_and_hostile_tokens_stay_on_their_line() -> None:
    done = pagefork("explain", "--next", "\x1b[2J\n\u202e", "--top", "200")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.stdout)
    assert len(done.stdout.splitlines()) == 1 + 2 + 1 + 200 + 1 + 2


def test_a_text_is_needed_and_at_least_one_row() -> None:
    assert_refused(pagefork("explain"), "--next")
    assert_refused(pagefork("explain", "--next", "x", "--top", "0"), "--top")
    assert_refused(pagefork("explain", "--next", PROMPT * 200, "--max-model-len", "64"), "max_model_len=64")


def test_the_command_works_where_the_locale_knows_only_ascii() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*COMMAND, "explain", "--next", "x"], capture_output=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()

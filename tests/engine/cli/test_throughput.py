"""`pagefork bench throughput`: every token of the load is counted, random or from a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import assert_refused, demo_with_template, pagefork
from transformers import AutoTokenizer

from pagefork import LLM, __version__
from pagefork.cli.load import Work, file_work, run_batch
from pagefork.demo import demo_path
from pagefork.scheduler.errors import InvalidRequestError


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / "result.json"


def test_random_prompts_count_as_they_were_asked_for(result: Path) -> None:
    load = ["--num-prompts", "3", "--input-len", "8", "--output-len", "4", "--n", "2", "--output-json", str(result)]
    done = pagefork("bench", "throughput", *load)
    assert (done.code, done.stderr) == (0, "")
    found = json.loads(result.read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (3, 3 * (8 + 2 * 4))
    assert found["tokens_per_second"] == pytest.approx(48 / found["elapsed_time"])
    assert found["output_tokens_per_second"] == pytest.approx(24 / found["elapsed_time"])
    assert found["requests_per_second"] == pytest.approx(3 / found["elapsed_time"])
    assert f"{found['output_tokens_per_second']:.1f} output tokens/s" in done.stdout


def test_a_result_names_its_machine_versions_and_settings(result: Path) -> None:
    arguments = ["bench", "throughput", "--num-prompts", "1", "--output-len", "1", "--dtype", "float32"]
    assert pagefork(*arguments, "--output-json", str(result)).code == 0
    found = json.loads(result.read_text())
    assert found["engine"]["dtype"] == "float32"
    machine = found["machine"]
    assert machine["command"] == f"pagefork {' '.join(arguments)} --output-json {result}"
    assert (machine["torch"], machine["pagefork"]) == (torch.__version__, __version__)
    assert machine["cores"] >= 1 and machine["cpu"]


def lines(file: Path, *entries: Any) -> Path:
    file.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return file


def test_a_file_gives_prompts_and_lengths(demo: LLM, tmp_path: Path, result: Path) -> None:
    file = lines(
        tmp_path / "prompts.jsonl",
        {"prompt": "import os"},
        "",
        {"prompt_token_ids": [5, 6, 7], "max_tokens": 2},
        {"prompt": "import os", "output_len": 1},
    )
    assert demo.engine.tokenizer is not None
    ids = demo.engine.tokenizer.encode("import os")
    assert file_work(demo.engine, file, None, 4) == [Work(ids, 4), Work([5, 6, 7], 2), Work(ids, 1)]
    assert file_work(demo.engine, file, 2, 4) == [Work(ids, 4), Work([5, 6, 7], 2)]
    load = ["--dataset", str(file), "--output-len", "4", "--output-json", str(result)]
    assert pagefork("bench", "throughput", *load).code == 0
    found = json.loads(result.read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (3, 2 * len(ids) + 3 + 4 + 2 + 1)
    assert pagefork("bench", "throughput", *load, "--num-prompts", "1").code == 0
    assert json.loads(result.read_text())["total_num_tokens"] == len(ids) + 4


def test_conversations_of_a_file_are_rendered_by_the_chat_template_of_the_model(tmp_path: Path) -> None:
    template = "{% for message in messages %}# {{ message.content }}\n{% endfor %}"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import os"}]
    llm = LLM(str(demo_with_template(tmp_path / "model", template)), num_blocks=8)
    file = lines(tmp_path / "prompts.jsonl", {"messages": messages, "max_tokens": 3})
    expected: Any = AutoTokenizer.from_pretrained(demo_path()).apply_chat_template(
        messages, chat_template=template, return_dict=False
    )
    assert file_work(llm.engine, file, None, 4) == [Work(expected, 3)]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "truncated"),
        ("[1]", "object"),
        ("{}", "none of them"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt and prompt_token_ids"),
        ({"prompt": "a", "max_token": 1}, "max_token"),
        ({"prompt": "a", "max_tokens": 0}, ">= 1"),
        ({"prompt": "a", "max_tokens": 2, "output_len": 2}, "one number"),
        ({"prompt": 3}, "$.prompt"),
        ({"prompt_token_ids": [1, -1]}, "-1"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [1] * 1024}, "1024 + 4"),
        ({"messages": [{"role": "user", "content": "a"}]}, "chat template"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(line: Any, named: str, demo: LLM, tmp_path: Path) -> None:
    file = lines(tmp_path / "prompts.jsonl", {"prompt": "import os"}, "", line)
    with pytest.raises(InvalidRequestError) as refused:
        file_work(demo.engine, file, None, 4)
    assert f"{file}:3: " in str(refused.value) and named in str(refused.value)


def test_a_load_that_cannot_be_run_is_refused_in_one_line(tmp_path: Path) -> None:
    file = lines(tmp_path / "prompts.jsonl", {"prompt": "import os"}, {"prompt": 3})
    assert_refused(pagefork("bench", "throughput", "--dataset", str(file)), f"{file}:2")
    assert_refused(pagefork("bench", "throughput", "--dataset", "/nowhere.jsonl"), "/nowhere.jsonl")
    assert_refused(pagefork("bench", "throughput", "--dataset", os.devnull), "has 0 prompts")
    assert_refused(pagefork("bench", "throughput", "--dataset", str(lines(file, {"prompt": "x"})), "--num-prompts", "2"), "has 1")
    assert_refused(pagefork("bench", "throughput", "--input-len", "1000", "--output-len", "25"), "1000 + 25", "1024")
    assert_refused(pagefork("bench", "throughput", "--num-prompts", "0"), "num_prompts=0")
    assert_refused(pagefork("bench", "throughput", "--output-json", "/nowhere/a.json"), "/nowhere")
    assert_refused(pagefork("bench", "throughput", "--output-json", str(tmp_path)), str(tmp_path), "folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_measured(result: Path) -> None:
    result.touch(0o444)
    assert_refused(pagefork("bench", "throughput", "--output-json", str(result)), str(result))


def test_the_times_of_all_tokens_add_up_to_the_time_of_their_outputs(demo: LLM) -> None:
    timing = run_batch(demo.engine, [Work([5, 6, 7], 6), Work([8, 9], 2)], n=2)
    assert (len(timing.first), len(timing.gaps), timing.generated) == (4, 2 * 5 + 2 * 1, 2 * 6 + 2 * 2)
    assert all(0 < first <= timing.elapsed for first in timing.first)
    ends = sum(timing.first) + sum(timing.gaps)  # the sum over the outputs of when each ended
    assert 2 * timing.elapsed < ends < 4 * timing.elapsed  # the two long outputs end with the batch

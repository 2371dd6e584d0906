"""The `pagefork` command, run as its users run it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pagefork import EngineConfig, PageforkError, RequestMetrics, RequestOutput, SamplingParams, __version__
from pagefork.cli.flags import Given, command
from pagefork.cli.text import one_line, printable
from pagefork.cli.view import JsonLines

COMMAND = [sys.executable, "-P", "-m", "pagefork"]
# The commands compute little, and beside other tests waiting for a second core would cost more than it gives.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PROMPT = "def read_lines(path):\n"
GREEDY = ["--temperature", "0", "--max-tokens", "16"]


def pagefork(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def generated(*arguments: str, stdin: str = "") -> list[dict[str, Any]]:
    """What `generate --json` prints."""
    done = pagefork("generate", "--json", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def greedy() -> dict[str, Any]:
    """The greedy completion of PROMPT."""
    [request] = generated(*GREEDY, PROMPT)
    return request


# Generating


def test_a_single_output_is_its_raw_text_wherever_the_prompt_comes_from(greedy: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "prompt.py"
    file.write_text(PROMPT + "\n")
    [output] = greedy["outputs"]
    assert len(output["token_ids"]) == 16
    assert pagefork("generate", *GREEDY, PROMPT).stdout == output["text"]
    assert pagefork("generate", *GREEDY, "--file", str(file)).stdout == output["text"]
    assert pagefork("generate", *GREEDY, stdin=PROMPT + "\n").stdout == output["text"]


def test_json_keeps_the_order_of_the_prompts_and_counts_what_was_asked() -> None:
    prompts = ["import os\n", "class Queue:", "x = "]
    requests = generated("--lines", "--n", "2", "--max-tokens", "8", "--ignore-eos", stdin="\n".join(p.strip() for p in prompts))
    assert [request["prompt"] for request in requests] == [prompt.strip() for prompt in prompts]
    for request in requests:
        assert [output["index"] for output in request["outputs"]] == [0, 1]
        assert all(len(output["token_ids"]) == 8 and output["finish_reason"] == "length" for output in request["outputs"])


def test_labelled_lines_hold_the_same_texts_as_json() -> None:
    arguments = ["import os", "class Queue:", "--n", "2", "--max-tokens", "24", "--seed", "5", "--ignore-eos"]
    lines = pagefork("generate", *arguments).stdout.splitlines()
    texts: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"(\[\d\.\d\]) (.*)", line, re.DOTALL)
        assert match, line
        texts.setdefault(match[1], []).append(match[2])
    expected = {f"[{i + 1}.{o['index'] + 1}]": o["text"] for i, r in enumerate(generated(*arguments)) for o in r["outputs"]}
    assert {name: "\n".join(parts) for name, parts in texts.items()} == {
        name: text.removesuffix("\n") for name, text in expected.items()
    }


def test_text_comes_while_it_is_generated_and_ctrl_c_ends_it_in_one_line() -> None:
    command_line = [*COMMAND, "generate", "--max-tokens", "1000", "--ignore-eos", "--seed", "1", PROMPT]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "pagefork: interrupted\n"


def test_flags_win_over_the_preset() -> None:
    assert (
        generated("--preset", "creative", *GREEDY, PROMPT)[0]["outputs"]
        == generated(*GREEDY, "--frequency-penalty", "0.5", PROMPT)[0]["outputs"]
    )


# The other commands


def test_info_tells_what_the_demo_model_runs_with() -> None:
    facts = json.loads(pagefork("info", "--json", "--num-blocks", "64", "--block-size", "8").stdout)
    assert (facts["parameters"], facts["num_blocks"], facts["block_size"]) == (5_770_496, 64, 8)
    table = pagefork("info", "--num-blocks", "64").stdout
    assert "5,770,496" in table
    assert len(table.splitlines()) == len(facts)


def test_bench_counts_every_token_of_the_load_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    load = ["--num-prompts", "3", "--input-len", "8", "--output-len", "4", "--n", "2", "--output-json", str(file)]
    done = pagefork("bench", "throughput", *load)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["total_num_tokens"] == 3 * (8 + 2 * 4)
    assert result["tokens_per_second"] == pytest.approx(48 / result["elapsed_time"])
    assert f"{result['output_tokens_per_second']:.1f} output tokens/s" in done.stdout


def test_demo_shows_every_output() -> None:
    lines = pagefork("demo", "--max-tokens", "4").stdout.splitlines()
    assert {f"[{i}.{j}]" for i in range(1, 5) for j in (1, 2)} <= {line.split(" ")[0] for line in lines}


def test_version() -> None:
    assert pagefork("--version").stdout == f"pagefork {__version__}\n"


# What is refused


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--top-p", "3", "x"], "top_p=3.0"),
        (["--n", "2", "--temperature", "0", "x"], "temperature=0"),
        (["--block-size", "0", "x"], "block_size=0"),
        (["--preset", "cod", "x"], "code, factual"),
        (["--file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt"),
        (["--file", os.devnull], "is empty"),
        (["--lines", "x"], "--lines"),
        ([], "standard input is empty"),
        (["--model", "/nowhere/model", "x"], "/nowhere/model"),
        (["--max-model-len", "8", PROMPT * 9], "8"),
    ],
)
def test_a_refusal_is_one_line_that_names_its_cause(arguments: list[str], named: str) -> None:
    done = pagefork("generate", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pagefork: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--dtype", "float8", "x"], ["--max-tokens", "many", "x"], ["--logit-bias", "3", "x"], ["--beams", "x"]]
)
def test_a_wrong_flag_is_a_usage_error(arguments: list[str]) -> None:
    done = pagefork("generate", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert "Traceback" not in done.stderr


# Flags


def parsed(*arguments: str) -> tuple[Given, Given]:
    """What a command gets for its two Structs."""
    app, got = typer.Typer(), []

    @command(app)
    def both(*, params: Annotated[Given, SamplingParams], engine: Annotated[Given, EngineConfig]) -> None:
        got.append((params, engine))

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return got[0]


def test_every_field_that_is_not_a_function_has_a_flag() -> None:
    shown = pagefork("generate", "--help").stdout
    names = [*SamplingParams.__struct_fields__, *EngineConfig.__struct_fields__]
    assert {name for name in names if f"--{name.replace('_', '-')}" not in shown} == {"rank_by"}


def test_only_given_flags_arrive_each_in_the_type_of_its_field() -> None:
    assert parsed() == ({}, {})
    params, engine = parsed(
        *("--max-tokens", "none", "--stop", "a", "--stop", "b", "--stop-token-ids", "3", "--top-k", "-1", "--temperature", "0.5"),
        *(
            "--logit-bias",
            "5=1.5",
            "--logit-bias",
            "6=-2",
            "--ignore-eos",
            "--no-skip-special-tokens",
            "--logprobs-mode",
            "processed",
        ),
        *("--seed", "7", "--engine-seed", "8", "--no-enable-prefix-caching", "--kv-cache-memory", "4096", "--dtype", "float32"),
    )
    assert params == {
        "max_tokens": None,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "top_k": -1,
        "temperature": 0.5,
        "logit_bias": {5: 1.5, 6: -2.0},
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs_mode": "processed",
        "seed": 7,
    }
    assert engine == {"seed": 8, "enable_prefix_caching": False, "kv_cache_memory": 4096, "dtype": "float32"}
    assert SamplingParams(**params).max_tokens is None


# Hostile text


@given(st.text())
def test_a_terminal_gets_no_control_character(text: str) -> None:
    shown = printable(text)
    assert {c for c in shown if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}
    assert [c for c in text if unicodedata.category(c) != "Cc" and unicodedata.bidirectional(c) not in BIDI] == [
        c for c in shown if c not in "\n\t"
    ]
    assert len(one_line(text).splitlines()) <= 1


BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
SHOW = """
from pagefork.cli.view import choose_view
from pagefork.outputs import CompletionOutput, RequestMetrics, RequestOutput
text = "safe \\x1b]0;title\\x07 \\x9b2J [bold]plain[/bold] \\u202e end"
view = choose_view(["\\x1b[2J"] * {prompts}, 1)
with view:
    for index in range({prompts}):
        done = CompletionOutput(index=0, text=text, token_ids=[1], finish_reason="length")
        facts = dict(request_id="0", prompt="", prompt_token_ids=[], finished=True, metrics=RequestMetrics(arrival_time=0.0))
        view.show(index, RequestOutput(outputs=[done], **facts))
"""


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_terminal_shows_model_text_without_its_escapes_and_its_markup_as_text(prompts: int) -> None:
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    with subprocess.Popen([sys.executable, "-P", "-c", SHOW.format(prompts=prompts)], stdout=there, env=environment) as process:
        os.close(there)
        shown = b""
        while chunk := read(here):
            shown += chunk
    os.close(here)
    assert process.returncode == 0
    assert shown.count(b"safe ]0;title 2J [bold]plain[/bold]  end") == prompts
    assert not any(escape in shown for escape in (b"\x1b]0", b"\x07", "\x9b".encode(), "\u202e".encode(), b"\x1b[2J"))


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux ends a terminal whose other side is closed
        return b""


def test_json_carries_the_message_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = RequestMetrics(arrival_time=0.0)
    error = PageforkError("no block left")
    with JsonLines() as view:
        output = RequestOutput(
            request_id="0", prompt="", prompt_token_ids=[], outputs=[], finished=True, metrics=metrics, error=error
        )
        view.show(0, output)
    assert json.loads(capsys.readouterr().out)["error"] == "no block left"

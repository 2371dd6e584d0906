"""`pagefork generate` and `pagefork demo`, run as their users run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from support.cli import COMMAND, ENVIRONMENT, GREEDY, PROMPT, assert_refused, generated, pagefork

from pagefork import LLM, InvalidRequestError, SamplingParams
from pagefork.cli import main
from pagefork.cli.generate import run
from pagefork.cli.view import choose_view


@pytest.fixture(scope="module")
def greedy() -> dict[str, Any]:
    """The greedy completion of PROMPT."""
    [request] = generated(*GREEDY, PROMPT)
    return request


def test_a_single_output_is_its_raw_text_wherever_the_prompt_comes_from(greedy: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "prompt.py"
    file.write_text(PROMPT + "\n")
    [output] = greedy["outputs"]
    assert len(output["token_ids"]) == 16
    assert pagefork("generate", *GREEDY, PROMPT).stdout == output["text"]
    assert pagefork("generate", *GREEDY, "--file", str(file)).stdout == output["text"]
    assert pagefork("generate", *GREEDY, stdin=PROMPT + "\n").stdout == output["text"]
    process = subprocess.run([*COMMAND, "generate", *GREEDY, PROMPT], capture_output=True, text=True, env=ENVIRONMENT)
    assert (process.returncode, process.stdout, process.stderr) == (0, output["text"], "")


def test_json_keeps_the_order_of_the_prompts_and_counts_what_was_asked() -> None:
    prompts = ["import os", "class Queue:", "x ="]
    requests = generated("--lines", "--n", "2", "--max-tokens", "8", "--ignore-eos", stdin="\n".join(prompts))
    assert [request["prompt"] for request in requests] == prompts
    for request in requests:
        assert [output["index"] for output in request["outputs"]] == [0, 1]
        assert all(len(output["token_ids"]) == 8 and output["finish_reason"] == "length" for output in request["outputs"])


def test_a_line_ends_at_a_line_feed_and_nowhere_else() -> None:
    prompts = ["a\x0bb\x0cc", "d\u2028e\x85f", "g\rh", "", "i", ""]
    text = "a\x0bb\x0cc\nd\u2028e\x85f\r\ng\rh\n\ni\n\n"
    found = generated("--lines", "--max-tokens", "1", stdin=text)
    assert [request["prompt"] for request in found] == prompts


def test_a_refused_prompt_among_several_is_named(demo: LLM) -> None:
    limit = ["--max-model-len", "8", "--max-tokens", "1"]
    assert_refused(pagefork("generate", *limit, "x", "y", PROMPT * 9), "prompt 3: ", "max_model_len=8")
    assert "prompt 1" not in pagefork("generate", *limit, PROMPT * 9).stderr
    with pytest.raises(InvalidRequestError, match=r"^prompt 2: "):
        run(LLM("demo", num_blocks=8).engine, ["x", PROMPT * 999], [SamplingParams()] * 2, choose_view(["x", "y"], 1))


@pytest.mark.parametrize("arguments", [["generate", *GREEDY, PROMPT], ["chat"], ["info", "--nothing"], ["--version"]])
def test_closed_streams_change_no_exit_code(arguments: list[str]) -> None:
    expected = pagefork(*arguments)
    with redirect_stdout(None), redirect_stderr(None):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        sys.stdout.close()
        sys.stderr.close()
    assert int(ended.value.code or 0) == expected.code


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


def test_demo_shows_every_output() -> None:
    lines = pagefork("demo", "--max-tokens", "4").stdout.splitlines()
    assert {f"[{i}.{j}]" for i in range(1, 5) for j in (1, 2)} <= {line.split(" ")[0] for line in lines}


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
    assert_refused(pagefork("generate", *arguments), named)


def test_a_prompt_that_is_not_utf8_is_refused() -> None:
    assert_refused(pagefork("generate", stdin=b"caf\xe9"), "standard input", "byte 3")

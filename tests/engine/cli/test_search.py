"""`pagefork explain --strategy`: what is drawn of a search is what its trace holds, whatever its texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from support.cli import PROMPT, assert_refused, generated, pagefork
from support.searches import search

from pagefork import LLM
from pagefork.cli.search_tree import draw

STRATEGIES = ["beam", "contrastive", "mcts"]
EVERYTHING = 10**6
FLAGS = {
    "beam": ["--beam-width", "3", "--n", "2"],
    "contrastive": ["--top-k", "4"],
    "mcts": ["--num-simulations", "12", "--top-k", "4", "--n", "2", "--visit-temperature", "1"],
}
EXACT = ["--max-tokens", "5", "--ignore-eos", "--dtype", "float32"]


def made_up(strategy: str, **sizes: int) -> dict[str, Any]:
    """A search without the lone surrogate, which no tokenizer decodes to and no terminal takes."""
    document: dict[str, Any] = json.loads(json.dumps(search(strategy, **sizes)).replace("\\ud800", ""))
    return document


def drawn(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str], top: int = EVERYTHING, depth: int = EVERYTHING
) -> list[str]:
    draw(document, top, depth)
    return capsys.readouterr().out.split("\n")[:-1]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_entry_has_its_line(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = made_up(strategy, steps=5)
    lines = drawn(document, capsys)
    entries = sum(len(step["token"]) - (strategy == "mcts") for step in document["steps"])
    rest = 2 + 1 + len(document["outputs"]) + 1  # title and legend, the note of what is missing, outputs, usage
    assert len(lines) == 5 + entries + rest
    assert len([line for line in lines if re.match(r"(output \d, )?token \d", line)]) == 5


def test_beams_are_drawn_with_their_fates_and_numbers_and_the_way_to_the_best_is_marked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = made_up("beam", steps=6)
    lines = drawn(document, capsys)
    for sign, fate in (("+", "kept"), ("*", "finished"), ("-", "pruned")):
        expected = sum(step["fate"].count(fate) for step in document["steps"])
        assert len([line for line in lines if re.match(rf"[├└]── [ >]\{sign} ", line)]) == expected > 0
    marked = [line for line in lines if re.match(r"[├└]── >", line)]
    assert len(marked) >= 6
    last = document["steps"][-1]
    assert any(f"{last['logprob'][1]:.3f}" in line and f"{last['cumulative'][1]:.3f}" in line for line in lines)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_not_drawn_is_counted(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = made_up(strategy, steps=4, outputs=1)
    lines = drawn(document, capsys, top=2, depth=1)
    for step in document["steps"]:
        if strategy == "beam":
            step["more"] = 6
        else:
            candidates = step["parent"].count(0) if strategy == "mcts" else len(step["token"])
            step["more"] = candidates - 2 - (strategy == "contrastive" and step["chosen"] > 1)
    counted = [sum(map(int, re.findall(r"(\d+) more", line))) for line in lines if " more" in line]
    if strategy == "beam":
        counted = [6 for line in lines if " more" in line and sum(map(int, re.findall(r"(\d+) more", line))) == 6]
    assert counted == [step["more"] for step in document["steps"]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("columns", [80, 40])
def test_hostile_texts_stay_on_their_lines_and_trees_within_the_width(
    strategy: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    document = made_up(strategy)
    harmless = {**document, "texts": dict.fromkeys(document["texts"], "x")}
    lines = drawn(document, capsys)
    assert len(lines) == len(drawn(harmless, capsys))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\n".join(lines))
    assert max(cell_len(line) for line in lines if line[:1] in "├└│ ") <= columns


def explained(strategy: str, *arguments: str) -> dict[str, Any]:
    done = pagefork("explain", "--json", "--strategy", strategy, *FLAGS[strategy], *EXACT, *arguments, PROMPT)
    assert (done.code, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def paths(document: dict[str, Any]) -> set[tuple[int, ...]]:
    """The outputs that a trace leads to."""
    steps = document["steps"]
    if document["strategy"] != "beam":
        outputs: dict[int, tuple[int, ...]] = {}
        for step in steps:
            place = step.get("output", 0)
            outputs[place] = (*outputs.get(place, ()), step["token"][step["chosen"]])
        return set(outputs.values())
    found: set[tuple[int, ...]] = set()
    before: list[tuple[int, ...]] = []
    for step in steps:
        before = [
            (*(before[parent] if parent >= 0 else ()), token) for parent, token in zip(step["parent"], step["token"], strict=True)
        ]
        found.update(path for path, fate in zip(before, step["fate"], strict=True) if fate == "finished")
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_trace_of_a_search_leads_to_its_outputs(strategy: str, demo: LLM) -> None:
    document = explained(strategy)
    outputs = [output["token_ids"] for output in document["outputs"]]
    assert all(len(tokens) == 5 for tokens in outputs) and len(outputs) == (1 if strategy == "contrastive" else 2)
    assert {tuple(tokens) for tokens in outputs} <= paths(document)
    assert demo.engine.tokenizer is not None
    for token, text in document["texts"].items():
        assert text == demo.engine.tokenizer.decode([int(token)], skip_special_tokens=False)
    assert (document["complete"], document["prompt"], document["model"]) == (True, PROMPT, "demo")
    if strategy != "mcts":  # draws depend on the id of the request
        [request] = generated("--strategy", strategy, *FLAGS[strategy], *EXACT, PROMPT)
        assert [output["token_ids"] for output in request["outputs"]] == outputs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_page_holds_what_json_prints_and_the_terminal_its_trees(strategy: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    document = explained(strategy, "--html", str(file))
    [held] = re.findall(r'<script id="document" type="application/json">(.*?)</script>', file.read_text(), re.DOTALL)
    assert json.loads(held) == document
    done = pagefork("explain", "--strategy", strategy, *FLAGS[strategy], *EXACT, PROMPT)
    assert (done.code, done.stderr) == (0, "")
    lines = done.stdout.split("\n")
    assert len([line for line in lines if re.match(r"(output \d, )?token \d", line)]) == len(document["steps"])
    assert [line for line in lines if line.startswith("[1]") and "length: " in line]


def test_flags_that_change_nothing_are_refused() -> None:
    assert_refused(pagefork("explain", "--next", "x", "--max-tokens", "3", "--depth", "2"), "--depth", "--max-tokens")
    assert_refused(pagefork("explain", "--next", "x", "--html", "x.html"), "--html")
    assert_refused(pagefork("explain", "--next", "x", "--beam-width", "3"), "SamplingParams", "beam_width")
    assert_refused(pagefork("explain", "--next", "x", "--strategy", "beam"), "--next", "--strategy")
    assert_refused(pagefork("explain", "--strategy", "beam", "--depth", "2", "x"), "--depth", "mcts")
    assert_refused(pagefork("explain", "--strategy", "beam", "--temperature", "2", "x"), "BeamSearchParams", "temperature")
    assert_refused(pagefork("explain", "--strategy", "sample", "x"), "--next", "beam")
    assert_refused(pagefork("explain", "x"), "--next", "beam")
    assert_refused(pagefork("explain", "--strategy", "beam"), "--next", "beam")
    assert_refused(pagefork("explain", "--strategy", "beam", "--html", "/nowhere/x.html", "x"), "/nowhere")


def test_a_file_of_settings_serves_both_kinds_of_explain(tmp_path: Path) -> None:
    file = tmp_path / "pagefork.toml"
    file.write_text('strategy = "beam"\nmax-tokens = 2\nbeam-width = 2\ntemperature = 0.5\nhtml = "/nowhere/x.html"\n')
    for arguments in (["--next", "x"], ["--strategy", "beam", "--html", str(tmp_path / "x.html"), "x"]):
        done = pagefork("explain", "--config", str(file), *arguments)
        assert (done.code, done.stderr) == (0, "")

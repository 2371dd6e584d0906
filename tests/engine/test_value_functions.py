"""Value functions: what they are worth to a search, on real code, on damaged code and on what is hardly text."""

from __future__ import annotations

import ast
import codeop
import inspect
import json
import math
import queue
import random
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pagefork import LLM, MCTSParams
from pagefork import Leaf as SearchLeaf
from pagefork.value_functions import VALUE_FUNCTIONS, brackets_balance, log_probability, parses_as_python

MODULES = [textwrap, json, queue, codeop, random, ast]


class Leaf(NamedTuple):
    text: str
    finish_reason: str | None = None
    cumulative_logprob: float = 0.0
    token_ids: Sequence[int] = ()
    prompt_token_ids: Sequence[int] = ()


def sources() -> Iterator[str]:
    """Functions, classes and statements of the standard library."""
    for module in MODULES:
        text = inspect.getsource(module)
        parts = (ast.get_source_segment(text, node) for node in ast.parse(text).body)
        yield from (part for part in parts if part and len(part) < 1500)


def python(text: str, prompt: str = "", finish_reason: str | None = None) -> float:
    [value] = parses_as_python(prompt)([Leaf(text, finish_reason)])
    return value


def reduced(text: str) -> str:
    """The brackets that are left when pairs are deleted until there are none."""
    brackets = "".join(character for character in text if character in "()[]{}")
    while (shorter := brackets.replace("()", "").replace("[]", "").replace("{}", "")) != brackets:
        brackets = shorter
    return brackets


def test_code_that_parses_is_worth_1_wherever_the_prompt_ends() -> None:
    chance = random.Random(0)
    for source in sources():
        at = chance.randrange(len(source))
        for finish_reason in (None, "length", "stop"):
            assert python(source[at:], source[:at], finish_reason) == 1


def test_code_that_breaks_off_is_worth_1_unless_it_ended_by_itself() -> None:
    """Where a part of a word misleads the parser it may be less: in one of a thousand places."""
    chance = random.Random(1)
    cuts = [source[: chance.randrange(len(source))] for source in sources() for _ in range(8)]
    values = [python(cut) for cut in cuts]
    assert len(values) > 500 and sum(value == 1 for value in values) >= 0.99 * len(values)
    ended = [python(cut, finish_reason="stop") for cut in cuts if cut]
    assert all((value == 1) == _parses(cut) for value, cut in zip(ended, filter(None, cuts), strict=True))


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except SyntaxError:
            return False
    return True


@pytest.mark.parametrize("damage", ["x = = 3\n", "def 4\n", ")\n", "a $ b\n", "   indented = 1\n"])
def test_the_value_is_the_share_before_the_error(damage: str) -> None:
    statements = [source for source in sources() if source.count("\n") < 12]
    for count in range(1, 9):
        before, after = "\n".join(statements[:count]) + "\n", "\n".join(statements[count:10]) + "\n"
        value = python(before + damage + after)
        share = len(before) / len(before + damage + after)
        assert share <= value <= share + len(damage) / len(before + damage + after)


def test_the_share_is_that_of_the_completion() -> None:
    assert python("x):\n  = 1", "def f(") == pytest.approx(6 / 9)
    assert python("x = 1\n", "y = = 2\n") == 0
    assert python("", "y = = 2\n") == 1
    assert python("é = 'ö'\nü = = 1\n") == pytest.approx(12 / 16)


def test_line_ends_of_all_kinds_count_alike() -> None:
    for end in ("\n", "\r\n", "\r"):
        assert python(f"a = 1{end}b = 2{end}") == 1
        assert python(f"a = 1{end}) = 2{end}") == 0.5


@given(st.text(), st.text(), st.sampled_from([None, "stop", "length"]))
@example("x\0y", "", None)
@example("\ud800", "", None)
@example("(" * 300, "", None)
@example("-" * 100_000 + "1", "", None)
@example("x" + ".x" * 50_000, "", None)
@example("\n", "\r", "stop")
@example("\\", "", "stop")
@example("\f\tif x:\n  \x0c y", "", None)
def test_any_text_has_a_value_between_0_and_1(text: str, prompt: str, finish_reason: str | None) -> None:
    for make in VALUE_FUNCTIONS.values():
        [value] = make(prompt)([Leaf(text, finish_reason)])
        assert 0 <= value <= 1


def test_odd_escapes_print_no_warnings(tmp_path: Path) -> None:
    code = """from types import SimpleNamespace
from pagefork.value_functions import parses_as_python
print(parses_as_python()([SimpleNamespace(text="x = '" + chr(92) + "d'", finish_reason=None)]))"""
    command = [sys.executable, "-P", "-W", "always", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[1.0]\n", "")


@given(st.text("()[]{}ab"), st.text("()[]{}ab"))
def test_brackets_count_as_pairs_when_deleting_pairs_deletes_them(prompt: str, text: str) -> None:
    whole = prompt + text
    count = sum(character in "()[]{}" for character in whole)
    [value] = brackets_balance(prompt)([Leaf(text)])
    assert value == (1 if not count else pytest.approx(1 - len(reduced(whole)) / count))


def test_the_log_probability_is_the_geometric_mean_of_the_probabilities() -> None:
    leaves = [Leaf("", None, math.log(0.5) + math.log(0.125), [1, 2]), Leaf(""), Leaf("", None, -math.inf, [1])]
    assert log_probability(leaves) == pytest.approx([0.25, 1, 0])
    assert VALUE_FUNCTIONS["log_probability"]("prompt")(leaves) == log_probability(leaves)


def test_leaves_are_valued_one_by_one() -> None:
    leaves = [Leaf("x = ()\n"), Leaf("x = )\n"), Leaf("")]
    for name, make in VALUE_FUNCTIONS.items():
        function = make("y = [\n" if name == "brackets_balance" else "")
        assert function(leaves) == [function([leaf])[0] for leaf in leaves]
        assert function([]) == []


def test_a_leaf_that_a_stop_text_ended_has_the_text_of_its_output(demo: LLM) -> None:
    seen: list[tuple[str, str | None]] = []

    def watch(leaves: list[SearchLeaf]) -> list[float]:
        seen.extend((leaf.text, leaf.finish_reason) for leaf in leaves)
        for leaf in leaves:
            leaf.prompt_token_ids += leaf.token_ids  # its own list
        return [float(len(leaf.prompt_token_ids) - len(leaf.token_ids) == count) for leaf in leaves]

    assert demo.engine.tokenizer is not None
    count = len(demo.engine.tokenizer.encode("print("))
    params = MCTSParams(num_simulations=30, max_tokens=8, stop=[")"], value_fn=watch)
    for kept in (False, True):
        seen.clear()
        [output] = demo.generate(["print("], params.replace(include_stop_str_in_output=kept), use_tqdm=False)
        ended = [text for text, reason in seen if reason == "stop"]
        assert output.error is None and ended
        assert all(text.endswith(")") == kept and text.count(")") == kept for text in ended)

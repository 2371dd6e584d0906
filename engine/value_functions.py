"""Value functions to search with: what a text that is under way is worth, from 0 to 1.

A value function takes the leaves of a search and returns one number for each. A leaf's `text` is the completion alone; where
the prompt's text belongs to what is judged, as with code, it is given to the function that makes the value function:

    MCTSParams(value_fn=parses_as_python("def area(radius):"))
"""

from __future__ import annotations

import ast
import codeop
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_SOURCE = "<completion>"
_PARTNER = {")": "(", "]": "[", "}": "{"}
_INCOMPLETE = codeop.PyCF_ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]  # the parser says that its input may break off
_CUT_TOKENS = ("unterminated", *(f"invalid {base}" for base in ("decimal", "hexadecimal", "binary", "octal")))

# A completion's odd escapes are nobody's concern. A filter of a name, since catch_warnings would change the other threads' too.
warnings.filterwarnings("ignore", module=_SOURCE)


class Leaf(Protocol):
    """What a value function may read of a leaf; `token_ids` and `text` are of the completion."""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def text(self) -> str: ...
    @property
    def cumulative_logprob(self) -> float: ...
    @property
    def finish_reason(self) -> str | None: ...


ValueFunction = Callable[[Sequence[Any]], list[float]]
MakesValueFunction = Callable[[str], ValueFunction]  # for a prompt's text


def log_probability(leaves: Sequence[Leaf]) -> list[float]:
    """exp(mean log-prob of the generated tokens), which is what a search goes by without a value function."""
    return [math.exp(leaf.cumulative_logprob / max(1, len(leaf.token_ids))) for leaf in leaves]


def brackets_balance(prompt: str = "") -> ValueFunction:
    """The share of the brackets ()[]{} that have a partner with nothing but pairs between them; 1 where there are none.

    All brackets count, also those in strings, and those of `prompt`.
    """
    return lambda leaves: [_paired(prompt + leaf.text) for leaf in leaves]


def parses_as_python(prompt: str = "") -> ValueFunction:
    """The share of the completion that comes before the first syntax error of `prompt` and completion together.

    A text that is under way, or was cut for its length, may break off anywhere. One that ended by itself must parse, and
    counts up to its last line if it breaks off. What is nested too deeply to be parsed is worth 0.
    """
    return lambda leaves: [_share_before_error(prompt, leaf.text, ended=leaf.finish_reason == "stop") for leaf in leaves]


# By the names that every engine knows.
VALUE_FUNCTIONS: dict[str, MakesValueFunction] = {
    "log_probability": lambda prompt: log_probability,
    "brackets_balance": brackets_balance,
    "parses_as_python": parses_as_python,
}


def _paired(text: str) -> float:
    open_: list[str] = []
    brackets = pairs = 0
    for character in text:
        if character in "([{":
            open_.append(character)
        elif character not in _PARTNER:
            continue
        elif open_ and open_[-1] == _PARTNER[character]:
            open_.pop()
            pairs += 1
        else:
            open_.append(character)  # nothing around it can pair any more
        brackets += 1
    return 2 * pairs / brackets if brackets else 1.0


def _share_before_error(prompt: str, completion: str, ended: bool) -> float:
    if not completion:
        return 1.0
    before, text = _with_newlines(prompt), _with_newlines(prompt + completion)
    try:
        valid = _valid_until(text, ended)
    except (MemoryError, RecursionError, ValueError):  # nested too deeply; or no Unicode text
        return 0.0
    return min(1.0, max(0.0, (valid - len(before)) / max(1, len(text) - len(before))))


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _valid_until(text: str, ended: bool) -> int:
    """How many characters come before the first syntax error."""
    text = text.partition("\0")[0]
    try:
        ast.parse(text, _SOURCE)
    except SyntaxError as error:
        start = _place(text, error.lineno, error.offset)
        if not _breaks_off(text, error, start):
            return start
        return text.rstrip().rfind("\n") + 1 if ended else len(text)
    return len(text)


def _breaks_off(text: str, error: SyntaxError, start: int) -> bool:
    """Whether more text could mend the error: the parser lacks some, or stumbled over the last token, which may go on."""
    if _lacks_more(text):
        return True
    if isinstance(error, IndentationError):
        return False
    end = _place(text, error.end_lineno, error.end_offset) if (error.end_offset or 0) > 0 else start
    return end >= len(text) or (error.msg.startswith(_CUT_TOKENS) and "\n" not in text[start:])


def _lacks_more(text: str) -> bool:
    try:
        compile(text, _SOURCE, "exec", ast.PyCF_ONLY_AST | _INCOMPLETE, dont_inherit=True)
    except SyntaxError as error:
        return "incomplete input" in str(error)  # as codeop tells it
    return False


def _place(text: str, line: int | None, column: int | None) -> int:
    """The index of a character from its line and column, which count from 1."""
    begin = 0
    for _ in range((line or 1) - 1):
        begin = text.find("\n", begin) + 1 or len(text)
    return min(len(text), begin + max(0, (column or 1) - 1))

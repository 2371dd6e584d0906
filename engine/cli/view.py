"""How outputs appear while they are generated: as raw text, as labelled lines, as a live board, or as JSON at the end."""

from __future__ import annotations

import os
import sys
from typing import Protocol, Self

import msgspec

from pagefork.cli.text import printable
from pagefork.outputs import CompletionOutput, RequestOutput


class View(Protocol):
    """Shows the outputs of requests, known by their place in the list of prompts. Used as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, index: int, output: RequestOutput) -> None: ...


def choose_view(prompts: list[str], n: int, *, json: bool = False, scored: bool = False) -> View:
    """What suits standard output: for several outputs a terminal gets a board, a pipe gets labelled lines.

    scored: outputs are ranked by a score, which several outputs are shown with.
    """
    if json:
        return JsonLines()
    if len(prompts) * n == 1:
        return RawText()
    if sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown"):
        from pagefork.cli.board import Board

        return Board(prompts, n)
    return LabelledLines(len(prompts), n, scored=scored)


def output_name(prompt: int, output: int, n: int) -> str:
    """`[2]`: what came of the second prompt; `[2.1]`: the first of its n outputs."""
    return f"[{prompt + 1}.{output + 1}]" if n > 1 else f"[{prompt + 1}]"


def score_of(completion: CompletionOutput) -> str:
    """` -1.234`, or nothing for an output without a score."""
    return "" if completion.score is None else f" {completion.score:.3f}"


class _Printed:
    """What the views that write lines have in common: a terminal never sees control characters of a model."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout.flush()

    def _write(self, text: str) -> None:
        sys.stdout.write(printable(text) if self._terminal else text)


class RawText(_Printed):
    """The text of one output as it comes, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self._text = ""

    def show(self, index: int, output: RequestOutput) -> None:
        text = output.outputs[0].text
        self._write(text[len(self._text) :])
        self._text = text
        sys.stdout.flush()

    def __exit__(self, *error: object) -> None:
        if self._terminal and not self._text.endswith("\n"):
            self._write("\n")
        super().__exit__(*error)


class LabelledLines(_Printed):
    """Every line when it is complete, after the name of its output; with scores, when the score is known."""

    def __init__(self, prompts: int, n: int, *, scored: bool = False) -> None:
        super().__init__()
        self._n = n
        self._scored = scored
        self._width = len(output_name(prompts - 1, n - 1, n))
        self._sent: dict[tuple[int, int], int] = {}

    def show(self, index: int, output: RequestOutput) -> None:
        for completion in output.outputs:
            key = (index, completion.index)
            begin = self._sent.get(key, 0)
            end = len(completion.text) if completion.finish_reason else 0 if self._scored else completion.text.rfind("\n") + 1
            if end > begin or (completion.finish_reason and key not in self._sent):
                name = output_name(*key, self._n).ljust(self._width) + (score_of(completion) if self._scored else "")
                for line in completion.text[begin:end].removesuffix("\n").split("\n"):
                    self._write(f"{name} {line}\n")
                self._sent[key] = end
        sys.stdout.flush()


class JsonLines(_Printed):
    """One JSON object per prompt, in the order of the prompts, when all are finished."""

    def __init__(self) -> None:
        super().__init__()
        self._finished: dict[int, RequestOutput] = {}

    def show(self, index: int, output: RequestOutput) -> None:
        if output.finished:
            self._finished[index] = output

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            for _, output in sorted(self._finished.items()):
                sys.stdout.buffer.write(msgspec.json.encode(output, enc_hook=str) + b"\n")  # UTF-8, whatever the locale
        super().__exit__(*error)

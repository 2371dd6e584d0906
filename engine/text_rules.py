"""Stop texts: whether a generated token completes one, across token boundaries."""

from __future__ import annotations

from typing import NamedTuple

from .tokenizer import DetokState, Tokenizer


class _State(NamedTuple):
    detok: DetokState = DetokState()
    tail: str = ""  # as much text as a stop text could have begun in


class StopTexts:
    """The scheduler's TextRules for one request. States are immutable, so forked sequences share them."""

    def __init__(
        self, tokenizer: Tokenizer, stop: list[str], skip_special_tokens: bool, include_stop_str_in_output: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._kept = include_stop_str_in_output
        self._stop = stop
        self._skip = skip_special_tokens
        self._keep = max((len(text) for text in stop), default=1) - 1

    def start(self) -> _State:
        """The state before the first generated token."""
        return _State()

    def check(self, state: _State, token: int) -> tuple[_State, str | None]:
        """The state after `token`, and the stop text that ends first in the text so far, if any."""
        detok, text = self._tokenizer.step(state.detok, token, self._skip)
        tail = state.tail + text
        found = first_stop(tail, self._stop, after=len(state.tail))
        return _State(detok, tail[max(0, len(tail) - self._keep) :]), found[1] if found else None

    def text(self, tokens: list[int], stop: int | str | None = None) -> str:
        """The text of generated tokens, as an output shows it that ended for the stop reason `stop`."""
        text = self._tokenizer.decode(tokens, self._skip)
        if not isinstance(stop, str):
            return text
        before = self._tokenizer.decode(tokens[:-1], self._skip)  # what came earlier ended nothing
        start = text.find(stop, max(0, len(before) - len(stop) + 1))
        return text if start < 0 else text[: start + (len(stop) if self._kept else 0)]


def first_stop(text: str, stop: list[str], after: int = 0) -> tuple[int, str] | None:
    """Where the stop text begins that is complete first, and which; those that end within `after` don't count.

    Of two that end together the longer one is taken.
    """
    starts = [(text.find(candidate, max(0, after - len(candidate) + 1)), candidate) for candidate in stop]
    found = [(start + len(candidate), start, candidate) for start, candidate in starts if start >= 0]
    return min(found)[1:] if found else None


def held_back(text: str, stop: list[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a stop text."""
    longest = max((len(candidate) for candidate in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(candidate.startswith(text[-length:]) for candidate in stop if len(candidate) > length):
            return length
    return 0

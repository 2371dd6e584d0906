"""Stop texts: whether a generated token completes one, across token boundaries."""

from __future__ import annotations

from typing import NamedTuple

from .tokenizer import DetokState, Tokenizer


class _State(NamedTuple):
    detok: DetokState = DetokState()
    tail: str = ""  # as much text as a stop text could have begun in


class StopTexts:
    """The scheduler's TextRules for one request. States are immutable, so forked sequences share them."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
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

    def text(self, tokens: list[int]) -> str:
        """The text of generated tokens."""
        return self._tokenizer.decode(tokens, self._skip)


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

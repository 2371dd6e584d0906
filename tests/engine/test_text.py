"""Streamed pieces add up to the text, never show half a character, and stop texts are found across tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from pagefork.demo import demo_path
from pagefork.text_rules import StopTexts, first_stop, held_back
from pagefork.tokenizer import DetokState, Tokenizer

BACKEND = Backend.from_file(str(demo_path() / "tokenizer.json"))
TOKENIZER = Tokenizer(BACKEND)


def pieces(ids: list[int]) -> list[str]:
    state, shown = DetokState(), []
    for token in ids:
        state, text = TOKENIZER.step(state, token)
        shown.append(text)
    return [*shown, TOKENIZER.rest(state)]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_pieces_of_any_text_add_up_to_it_and_hold_no_half_character(text: str) -> None:
    shown = pieces(TOKENIZER.encode(text))
    assert "".join(shown) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in shown)


@given(st.lists(st.integers(0, 4095), max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_of_any_tokens_are_a_text(ids: list[int]) -> None:
    """Random tokens are rarely valid UTF-8; where they are, the pieces are exactly what decoding all at once gives."""
    whole = TOKENIZER.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces(ids)) == whole


def test_a_long_run_of_bytes_that_are_no_character_is_not_held_back_for_ever() -> None:
    byte = next(i for i in range(1, 300) if TOKENIZER.decode([i]) == "\ufffd")
    assert any(pieces([byte] * 40)[:20])


@given(
    st.text(alphabet="abAB \n€𝄞", max_size=30),
    st.lists(st.text(alphabet="abAB \n€𝄞", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_a_stop_text_is_hit_with_the_token_that_completes_it(text: str, stop: list[str]) -> None:
    rules = StopTexts(TOKENIZER, stop, skip_special_tokens=True)
    state, seen = rules.start(), ""
    detok = DetokState()
    for token in TOKENIZER.encode(text):
        state, hit = rules.check(state, token)
        detok, piece = TOKENIZER.step(detok, token)
        seen += piece
        expected = first_stop(seen, stop)
        assert hit == (expected[1] if expected else None)
        if hit is not None:
            return
        assert not any(candidate in seen for candidate in stop)


def test_states_are_shared_by_forks() -> None:
    rules = StopTexts(TOKENIZER, ["xyz"], skip_special_tokens=True)
    state, _ = rules.check(rules.start(), TOKENIZER.encode("x")[0])
    state, _ = rules.check(state, TOKENIZER.encode("y")[0])
    for last, hit in (("z", "xyz"), ("a", None), ("z", "xyz")):
        assert rules.check(state, TOKENIZER.encode(last)[0])[1] == hit


@pytest.mark.parametrize(
    ("text", "stop", "after", "expected"),
    [
        ("hello", ["l"], 0, (2, "l")),
        ("hello", ["lo", "ell"], 0, (1, "ell")),
        ("ab", ["b", "ab"], 0, (0, "ab")),
        ("aXbX", ["X"], 2, (3, "X")),
        ("abab", ["ab"], 2, (2, "ab")),
        ("abc", ["d"], 0, None),
    ],
)
def test_the_stop_text_that_is_complete_first_wins(
    text: str, stop: list[str], after: int, expected: tuple[int, str] | None
) -> None:
    assert first_stop(text, stop, after) == expected


@pytest.mark.parametrize(
    ("text", "stop", "count"),
    [("abc", ["cd"], 1), ("ab\n", ["\n\n"], 1), ("xab", ["abc", "b!"], 2), ("abc", ["x"], 0), ("", ["x"], 0)],
)
def test_only_what_could_begin_a_stop_text_is_held_back(text: str, stop: list[str], count: int) -> None:
    assert held_back(text, stop) == count

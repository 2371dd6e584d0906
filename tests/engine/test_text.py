"""Stop texts are found across tokens, with the token that completes them, whatever the tokenizer."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import KINDS, backend

from pagefork.text_rules import StopTexts, first_stop, held_back
from pagefork.tokenizer import DetokState, Tokenizer

PARTS = ["the", "ing", " the", "lo", "né", "日本", "😀", "é", "'s", " .", "  ", "\n", "<|im_end|>", "<tool>"]


def shown(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    """The text after every token."""
    state, pieces = DetokState(), []
    for token in ids:
        state, piece = tokenizer.step(state, token, skip)
        pieces.append(piece)
    return list(accumulate(pieces))


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), data=st.data(), skip=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stop_text_is_hit_with_the_token_that_completes_it(
    kind: str, parts: list[str], data: st.DataObject, skip: bool
) -> None:
    tokenizer = Tokenizer(backend(kind))
    ids = tokenizer.encode("".join(parts))
    texts = shown(tokenizer, ids, skip)
    whole = texts[-1] if texts else ""
    excerpt = st.builds(lambda at, length: whole[at : at + length] or "x", st.integers(0, len(whole)), st.integers(1, 6))
    stop = data.draw(st.lists(excerpt | st.sampled_from(["the", " n", "\n\n", "x", "s>"]), min_size=1, max_size=3))
    rules = StopTexts(tokenizer, stop, skip)
    state = rules.start()
    for token, text in zip(ids, texts, strict=True):
        state, hit = rules.check(state, token)
        ends = [(text.find(candidate) + len(candidate), -len(candidate), candidate) for candidate in stop if candidate in text]
        assert hit == (min(ends)[2] if ends else None)
        if hit is not None:
            break


def test_states_are_shared_by_forks() -> None:
    tokenizer = Tokenizer(backend("byte_level"))
    rules = StopTexts(tokenizer, ["xyz"], skip_special_tokens=True)
    state, _ = rules.check(rules.start(), tokenizer.encode("x")[0])
    state, _ = rules.check(state, tokenizer.encode("y")[0])
    for last, hit in (("z", "xyz"), ("a", None), ("z", "xyz")):
        assert rules.check(state, tokenizer.encode(last)[0])[1] == hit


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

"""Bodies: JSON to the letter, and nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagefork.http.body import parse_object
from pagefork.http.errors import ApiError, to_json

NO_OBJECTS = [
    b"",
    b"[]",
    b"null",
    b'"text"',
    b"{",
    b"{'a': 1}",
    b'{"a": 1} x',
    b'{"a": 1,}',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b'{"a": "\xed\xa0\x80"}',
    b'{"a": "\\ud800"}',
    b'{"a": ["\\uD83D", "\\uDE00"]}',
    b'{"\\udfff": 1}',
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b'{"a": 1e999}',
    b'{"a": 9223372036854775808}',
    b'{"a": -9223372036854775809}',
    b'{"a": ' + b"9" * 100_000 + b"}",
    b'{"a": 1, "a": 1}',
    b'{"a": {"b": 1, "b": 2}}',
    b'{"a": ' + b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
]


@pytest.mark.parametrize("body", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_what_is_no_json_object_is_refused_with_a_reason(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(body)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.booleans())
def test_what_json_can_say_is_read_as_the_standard_library_reads_it(value: dict[str, object], escaped: bool) -> None:
    body = json.dumps(value, ensure_ascii=escaped).encode()
    assert parse_object(body) == json.loads(body)


@given(st.binary(max_size=200))
def test_bytes_are_an_object_or_an_error_in_shape(body: bytes) -> None:
    try:
        assert isinstance(parse_object(body), dict)
    except ApiError as error:
        assert error.status == 400 and json.loads(to_json(error.body()))["error"]["message"]


@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Zl", "Zp"])))
def test_answers_are_ascii_where_characters_could_end_a_line_or_are_none(text: str) -> None:
    encoded = to_json({"text": text}).decode()
    assert json.loads(encoded) == {"text": text}
    assert len(encoded.splitlines()) == 1 and not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in encoded)

"""docs/protocol.md: its bytes are messages of the wire, and it names everything that there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from pagefork import wire

PAGE = (Path(__file__).parents[3] / "docs/protocol.md").read_text()
EXAMPLE = re.compile(r"^(\w+) +((?:[0-9a-f]{2} ){7}[0-9a-f]{2})\n((?: +(?:[0-9a-f]{2} ?)+\n)+) +(.*)$", re.MULTILINE)


def told(text: str) -> Any:
    """The body that stands below the bytes."""
    return msgspec.json.decode(text.split(", with the token ids", maxsplit=1)[0].replace("nil", "null"))


def test_the_bytes_of_the_example_are_the_messages_that_it_says() -> None:
    shown = EXAMPLE.findall(PAGE)
    assert [name for name, *_ in shown] == ["Hello", "Submit", "Accepted", "Deltas", "Finished"]
    for name, header, rest, body in shown:
        frames = [bytes.fromhex(line) for line in [header, *rest.splitlines()]]
        decode = wire.decode_from_client if frames[0][5] < 128 else wire.decode_from_engine
        message, blob = decode(frames)
        assert type(message).__name__ == name
        assert wire.encode(message, blob) == frames
        assert msgspec.msgpack.decode(frames[1]) == told(body)
    assert wire.decode_tokens(bytes.fromhex(shown[1][2].splitlines()[1])) == [5, 300]


def test_every_message_part_of_one_and_code_is_there_and_types_have_their_numbers() -> None:
    for number, kind in (wire.CLIENT_TYPES | wire.ENGINE_TYPES).items():
        assert f"### {kind.__name__}\n\nType {number}.\n\n<!-- table of wire.{kind.__name__} -->" in PAGE
    linked = set(re.findall(r"\(#(\w+)\)", PAGE))
    assert linked <= set(re.findall(r"^### (\w+)$", PAGE.lower(), re.MULTILINE))
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE, re.MULTILINE)) == {code.value for code in wire.Code}

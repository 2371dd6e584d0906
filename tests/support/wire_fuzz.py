"""Frames that a hostile or broken client could send: a seed gives the same ones again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from pagefork.wire import CLIENT_TYPES, ENGINE_TYPES, MAGIC, VERSION

Frames = list[bytes]

# Where the names of the protocol's fields come from, so that a body is wrong in one place rather than in all.
_NAMES = sorted({field for kind in CLIENT_TYPES.values() for field in kind.__struct_fields__})
_PARAMS = ["type", "n", "best_of", "max_tokens", "temperature", "beam_width", "num_simulations", "max_depth", "rollout_tokens"]
_PARAMS += ["leaf_batch_size", "top_k", "stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logit_bias", "logprobs"]
_PARAMS += ["prompt_logprobs", "seed", "value_fn", "rank_by", "logits_processors", "min_tokens", "trace", "window", "alpha"]
_NUMBERS = [0, 1, 2, 16, 127, 128, 129, 255, 256, 257, 1023, 1024, 4096, 4097, 2**16, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
_NUMBERS += [2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**31) - 1, -(2**63)]
_TEXTS = [
    "",
    "a",
    "..",
    "x" * 64,
    "x" * 65,
    "x" * 257,
    "é" * 40,
    "\0",
    "a\nb",
    "a b",
    "../../etc/passwd",
    "__class__",
    "\ud7ff\U0010ffff",
]
_TEXTS += ["sampling", "beam", "contrastive", "mcts", "os.system", "a\r\n1970 INFO forged", "\x1b[2J", "<script>"]


class Fuzz:
    """`rids`: names of requests that the fuzzed service may know; `session`: a secret that it may."""

    def __init__(self, seed: int, rids: Sequence[str] = ("a", "b", "c"), session: bytes = b"") -> None:
        self._rng = random.Random(seed)
        self._rids = list(rids)
        self._session = session
        self._ways: list[Callable[[], Frames]] = [
            *[self._message] * 8,
            *[self._mutated] * 6,
            *[self._truncated] * 2,
            self._nested,
            self._huge,
            self._duplicate_keys,
            self._wrong_count,
            self._odd_blob,
            self._bad_header,
            self._noise,
        ]

    def frames(self, count: int) -> Iterator[Frames]:
        """So many messages."""
        for _ in range(count):
            yield self._rng.choice(self._ways)()

    def _message(self) -> Frames:
        """Any type, every field of it perhaps, with values around their limits."""
        number = self._rng.choice(list(CLIENT_TYPES))
        body = {name: self._field(name) for name in CLIENT_TYPES[number].__struct_fields__ if self._rng.random() < 0.7}
        if self._rng.random() < 0.1:
            body[self._rng.choice(_NAMES)] = self._value()
        return self._framed(number, msgspec.msgpack.encode(body))

    def _valid(self) -> Frames:
        number = self._rng.choice(list(CLIENT_TYPES))
        body: dict[str, Any] = {}
        if "rid" in CLIENT_TYPES[number].__struct_fields__:
            body["rid"] = self._rng.choice(self._rids)
        if number == 2:
            body |= {"params": {"type": "sampling", "max_tokens": 2}, "credit": 9}
        if number == 3:
            body["upto"] = self._rng.randrange(99)
        blob = struct.pack("<3I", 1, 2, 3) if number == 2 else None
        return [_header(number), msgspec.msgpack.encode(body), *([blob] if blob else [])]

    def _mutated(self) -> Frames:
        """A message that was valid before some bytes were changed, put in, taken out or repeated."""
        frames = self._valid()
        at = self._rng.randrange(len(frames))
        data = bytearray(frames[at])
        for _ in range(self._rng.randint(1, 4)):
            place = self._rng.randrange(len(data) + 1)
            match self._rng.randrange(4):
                case 0 if place < len(data):
                    data[place] ^= 1 << self._rng.randrange(8)
                case 1:
                    data[place:place] = self._rng.randbytes(self._rng.randint(1, 6))
                case 2:
                    del data[place : place + self._rng.randint(1, 4)]
                case _:
                    data[place:place] = data[place : place + self._rng.randint(1, 9)]
        frames[at] = bytes(data)
        return frames

    def _truncated(self) -> Frames:
        frames = self._message() if self._rng.random() < 0.5 else self._valid()
        frames[1] = frames[1][: self._rng.randrange(len(frames[1]) + 1)]
        return frames

    def _nested(self) -> Frames:
        """Arrays or maps, one in the other, far deeper than any decoder's stack; where a parameter may stand, too."""
        depth = self._rng.choice([10, 1000, 100_000])
        deep = self._rng.choice([b"\x91", b"\x81\xa1a"]) * depth + b"\xc0"
        if self._rng.random() < 0.5:
            return self._framed(self._rng.choice(list(CLIENT_TYPES)), deep)
        inner = self._rng.choice([b"", b"\x82\xa4type\xa8sampling\xa4stop"]) + deep
        return [_header(2), b"\x82\xa3rid" + msgspec.msgpack.encode(self._rng.choice(self._rids)) + b"\xa6params" + inner]

    def _huge(self) -> Frames:
        """Headers that promise gigabytes."""
        size = self._rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\xff\xff\xff"])
        lead = self._rng.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"])
        body = lead + size + self._rng.randbytes(self._rng.randrange(20))
        return self._framed(self._rng.choice(list(CLIENT_TYPES)), self._rng.choice([b"", b"\x81\xa3rid", b"\x81\xa4have"]) + body)

    def _duplicate_keys(self) -> Frames:
        first, second = self._rng.choice(self._rids), self._rng.choice(_TEXTS)
        number = self._rng.choice([2, 3, 4, 5])
        pairs = [("rid", first), ("rid", second), ("credit" if number in (2, 5) else "upto", 1)]
        self._rng.shuffle(pairs)
        body = bytes([0x80 | len(pairs)]) + b"".join(msgspec.msgpack.encode(part) for pair in pairs for part in pair)
        return self._framed(number, body)

    def _wrong_count(self) -> Frames:
        frames = self._valid()
        return self._rng.choice([[], frames[:1], frames[1:], [*frames, b"", b""], [b""] * 5, frames * 3, [b"", *frames]])

    def _odd_blob(self) -> Frames:
        frames = self._valid()[:2]
        tokens = [self._rng.choice(_NUMBERS) & 0xFFFFFFFF for _ in range(self._rng.choice([0, 1, 3, 300, 5000]))]
        blob = struct.pack(f"<{len(tokens)}I", *tokens)
        return [*frames, blob[: len(blob) - self._rng.randrange(3)]]

    def _bad_header(self) -> Frames:
        magic = self._rng.choice([MAGIC, b"PGFK", b"HTTP", b"\0\0\0\0", b"GET "])
        number = self._rng.choice([0, 9, 127, 255, *CLIENT_TYPES, *ENGINE_TYPES])
        header = struct.pack(
            "<4sBBH", magic, self._rng.choice([VERSION, VERSION, 0, 2, 255]), number, self._rng.choice([0, 0, 1, 65535])
        )
        return [header[: self._rng.choice([8, 8, 8, 7, 0])] + self._rng.choice([b"", b"", b"x"]), self._valid()[1]]

    def _noise(self) -> Frames:
        return [self._rng.randbytes(self._rng.choice([0, 1, 8, 60, 2000])) for _ in range(self._rng.randint(1, 4))]

    def _framed(self, number: int, body: bytes) -> Frames:
        frames = [_header(number), body]
        if self._rng.random() < 0.3:
            frames.append(struct.pack("<4I", 1, 2, 3, self._rng.choice([4, 2**31, 2**32 - 1])))
        return frames

    def _field(self, name: str) -> Any:
        """Mostly of the kind that the field is for."""
        draw = self._rng.random()
        if draw < 0.15:
            return self._value()
        if name == "rid":
            return self._rng.choice(self._rids) if draw < 0.9 else self._rng.choice(_TEXTS)
        if name == "session":
            return self._rng.choice([self._session, self._session[:-1], self._rng.randbytes(16), b"", b"x" * 65])
        if name == "params":
            kind = self._rng.choice(["sampling", "beam", "contrastive", "mcts"])
            chosen = self._rng.sample(_PARAMS[1:], self._rng.randrange(4))
            return {"type": kind, "max_tokens": self._rng.choice([1, 2, 3]), **{each: self._value() for each in chosen}}
        if name == "have":
            count = self._rng.choice([0, 1, 2, 70])
            return [{"tokens": self._rng.choice(_NUMBERS[:12]), "characters": self._rng.randrange(9)} for _ in range(count)]
        if name == "stream":
            return draw < 0.5
        if name in ("text", "client", "token"):
            return self._rng.choice(_TEXTS)
        return self._rng.choice(_NUMBERS)

    def _value(self, depth: int = 0) -> Any:
        match self._rng.randrange(9 if depth < 3 else 6):
            case 0:
                return None
            case 1:
                return self._rng.random() < 0.5
            case 2:
                return self._rng.choice(_NUMBERS)
            case 3:
                return self._rng.choice([0.0, -0.0, 1e-9, 1.0, 1e308, float("nan"), float("inf"), -1.5])
            case 4:
                return self._rng.choice(_TEXTS)
            case 5:
                return self._rng.randbytes(self._rng.choice([0, 1, 16, 64, 65, 300]))
            case 6 | 7:
                return [self._value(depth + 1) for _ in range(self._rng.choice([0, 1, 3, 20]))]
            case _:
                keys = self._rng.sample(_NAMES + _PARAMS, self._rng.randrange(4))
                return {key: self._value(depth + 1) for key in keys}


def _header(number: int) -> bytes:
    return struct.pack("<4sBBH", MAGIC, VERSION, number, 0)

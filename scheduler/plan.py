"""The seam between scheduler and runner: arrays that say what to compute and what to read off.

One idea replaces phases: a row is the tokens between what is computed and what is known. A prompt, a chunk
of it, one decoded token, a resumed sequence and a search leaf are all (start, tokens).

A runner does the parts of a Plan in this order: forks (every source is read before any slot is written),
closes, opens, table deltas, block copies (sources before destinations), forward, probes. Everything is
plain data (numpy arrays and msgspec Structs), so a plan can be logged, replayed or sent to several ranks.

Shapes: R rows, T tokens, P probe entries, G runs of rows that share leading blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import chain
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

LAST_TOKEN = -1  # in Rows.tokens: the token that this slot drew last, which only the device knows yet


def ints(values: Any = ()) -> Ints:
    return np.asarray(values, np.int32)


def flat(parts: Sequence[Sequence[Any] | NDArray[Any]], dtype: Any = np.int32) -> NDArray[Any]:
    """Lists and arrays, one after another."""
    if any(type(part) is np.ndarray for part in parts):
        return np.concatenate(parts, dtype=dtype, casting="unsafe")
    return np.array(list(chain.from_iterable(parts)), dtype)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """How the logits of one request's sequences are processed; static while it runs. Neutral values are off."""

    prompt_len: int
    seed: int = 0
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_tokens: int = 0
    end_ids: tuple[int, ...] = ()  # banned until min_tokens are generated
    allowed_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences; the last token is banned after the others
    logit_bias: tuple[tuple[int, float], ...] = ()
    processed: bool = False  # report log-probs of the processed distribution, not of the model's
    rank: bool = False  # report the rank of the drawn token (one more pass over the logits)
    processors: int = 0  # the number under which the runner knows the request's own logits processors; 0: none

    @property
    def history(self) -> bool:
        """Whether the tokens of the sequence so far take part, so that a slot has to hold them."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or self.no_repeat_ngram_size > 0
            or any(len(word) > 1 for word in self.bad_words)
            or self.processors > 0
        )


class Forks(msgspec.Struct):
    """Slots that become copies of others: table, history, last token, spec; all but the stream."""

    src: Ints
    dst: Ints
    stream: Longs


class Opens(msgspec.Struct):
    """Slots that start afresh. History tokens [begin, end) of `tokens` are given where the spec needs them."""

    slot: Ints
    spec: Ints  # index into Plan.specs
    stream: Longs
    begin: Ints
    end: Ints
    tokens: Ints


class Tables(msgspec.Struct):
    """Block-table entries that changed: table[slot, column] = block."""

    slot: Ints
    column: Ints
    block: Ints


class Copies(msgspec.Struct):
    """Whole blocks to copy, in every layer; no destination is a source."""

    src: Ints
    dst: Ints


class Rows(msgspec.Struct):
    """What to compute. Row r feeds tokens[offset[r]:offset[r+1]] at positions start[r], start[r]+1, ...

    `trunk[g]` = (first row, rows, blocks): a run of rows whose tables begin with the same blocks.
    """

    slot: Ints  # [R]
    start: Ints  # [R]
    offset: Ints  # [R+1]
    tokens: Ints  # [T]; LAST_TOKEN: the slot's last token on the device
    trunk: Ints  # [G, 3]


class Kind(IntEnum):
    """What is read off a position."""

    SAMPLE = 0  # draw a token; it becomes the slot's last token
    TOPN = 1  # the n most probable tokens with their log-prob and processed probability
    MERGE = 2  # the n best (sequence, token) pairs of a search, scores accumulated
    TARGET = 3  # log-probs of given tokens


class Probe(msgspec.Struct):
    """One kind of read-out at P places. Several entries may name one position, with different slots.

    The slot gives spec, stream and history; the position the drawn token would have keys the draw. The rest belongs to
    single kinds.

    TOPN: `processed` takes the tokens that are the most probable after processing instead of those with the best reported
    log-probs. `window` reads the similarity of the position to earlier ones too: to the last window[p], or to all where
    that is 0.
    MERGE: entries groups[g] .. groups[g+1] are the live sequences of one search, `bias` their scores so far. `processed` takes
    the log-probs of the processed logits instead of processing log-probs.
    TARGET: `target` are the tokens that are scored.
    """

    kind: Kind
    at: Ints  # [P] index into Rows.tokens
    slot: Ints  # [P]
    n: int = 0
    processed: bool = False
    window: Ints | None = None  # [P]
    groups: Ints | None = None  # [G+1]
    bias: Floats | None = None  # [P]
    target: Ints | None = None  # [P]


class Plan(msgspec.Struct):
    """One step."""

    step: int
    specs: list[Spec]
    forks: Forks
    closes: Ints
    opens: Opens
    tables: Tables
    copies: Copies
    rows: Rows
    probes: list[Probe]


class Reads(msgspec.Struct):
    """What one Probe found; arrays parallel to its entries, None where the kind has no such thing.

    TOPN orders by log-prob (descending, ties to the lower id), or by p where the probe says `processed`, and then tokens
    without a chance are left out; columns past the last token are id -1. TARGET gives logp, rank, top_id and top_logp.

    MERGE has one row per group: the n best pairs of an entry (`parent`, its index) and a token (`top_id`) by `score`:
    bias + log-prob, processed by the stages before the temperature and not renormalised; ties to the lower parent, then
    to the lower id. Where there are fewer, parent and id are -1. top_logp is the log-prob that the spec reports.

    `why` says what made an entry bad if it was not the model, by index. Where processing left nothing, an entry of MERGE, or
    of TOPN that is `processed`, is not bad: it has no ids.
    """

    bad: Bools  # [P] NaN or only -inf: the other fields of this entry mean nothing
    token: Ints | None = None  # [P]
    logp: Floats | None = None  # [P]
    rank: Ints | None = None  # [P], 1 is the most probable; 0 where the spec did not ask
    top_id: Ints | None = None  # [P, n]
    top_logp: Floats | None = None  # [P, n]
    top_p: Floats | None = None  # [P, n], the processed probability; TOPN that is `processed`
    top_rank: Ints | None = None  # [P, n] or [G, n], as rank; MERGE, and TOPN that is `processed`
    parent: Ints | None = None  # [G, n]
    score: Floats | None = None  # [G, n]
    sim: Floats | None = None  # [P], the largest cosine; -1 where nothing is earlier
    why: dict[int, str] = {}


class Result(msgspec.Struct):
    """What a step gave: one Reads per Probe of the plan."""

    step: int
    reads: list[Reads]


class Runner(Protocol):
    """Whoever computes plans, in the order they are submitted."""

    def submit(self, plan: Plan) -> None: ...

    def collect(self) -> Result: ...

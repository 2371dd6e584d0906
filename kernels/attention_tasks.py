"""Attention of a step cut into tasks, on the host: which tokens multiply which keys together.

A task is a few neighbouring tokens and the keys that they walk through together, in the table of one slot. Keys are cut
at multiples of SPLIT of their position, so that what one token computes does not depend on who is computed beside it.

* Rows of few tokens are one task for every tile of tokens and every split; partial results are merged split by split.
* Rows whose tables begin alike, and that lie behind whole splits of what they share, walk through those as one.
* Rows of many tokens are one task for every tile of tokens, over all of its keys ("whole"): nothing has to be merged.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.signedinteger[Any]]

SPLIT = 256  # keys
WORDS = 6  # of a record
_WHOLE_HEIGHT = 1024  # rows of the product from which a row of tokens is whole: its tiles alone keep a device busy
_TOKENS = 8  # of a tile where every row has one token: those of a group of sequences
_HEIGHTS = (16, 64, 128)  # rows of a tile: at least, of single tokens and short rows at most, of whole rows


class Tasks(NamedTuple):
    """The attention of T tokens.

    records: int32 [M, 6], first token, tokens, slot of the table, first key, key behind the last one, whether it is whole;
    those that take longest come first. part: int32 [T + 1]; part[t + 1] - part[t] is the number of partial results of token t,
    the first of which is that of the split of the first key that it sees. Where it is 0 one task does all of its keys.
    rows: rows of the product that a tile has room for, each a token and one of the query heads that share a KV head.
    """

    records: NDArray[np.int32]
    part: NDArray[np.int32]
    rows: int


class _Spans(NamedTuple):
    """Tiles of tokens, and the keys that each walks through: one array per field."""

    token: Ints
    tokens: Ints
    slot: Ints
    first: Ints
    end: Ints


def plan_tasks(
    slot: Ints,
    start: Ints,
    length: Ints,
    trunk: Ints,
    *,
    group: int,
    block_size: int,
    window: int | None = None,
    invariant: bool = False,
    split: int = SPLIT,
) -> Tasks:
    """The tasks of R rows: row r has the length[r] >= 1 tokens at positions start[r], start[r] + 1, ... of slot[r].

    trunk: [G, 3], runs of rows whose tables begin alike: first row, rows, blocks. group: query heads per KV head. A token
    sees the last `window` keys up to its own. invariant: tiles have the same height in every step.
    """
    offset = np.concatenate(([0], np.cumsum(length, dtype=np.int64)))
    whole = length * group >= _WHOLE_HEIGHT
    rows = _height(int(length.max(initial=1)), group, invariant)
    tile = rows // group
    token, row, tokens = _tiles(offset[:-1], length, tile)
    position = start[row] + token - offset[row]
    seen, end = _first_seen(position, window), position + tokens
    shared = _shared(start, whole, trunk, block_size, split)
    own = np.zeros(len(length), np.int64)  # the first key that is not read for a whole run
    if len(shared):
        own[_numbers(shared[:, 0], shared[:, 1])[0]] = np.repeat(shared[:, 2], shared[:, 1])
    spans = _Spans(token, tokens, slot[row], np.maximum(seen, own[row]), end)
    records = []
    if whole.any():
        alone = whole[row]
        records.append(_whole_tasks(_picked(spans, alone)))
        spans = _picked(spans, ~alone)
    if len(shared):
        records.append(_split_tasks(_shared_spans(shared, slot, start, offset, tile, window), split))
    records.append(_split_tasks(spans, split))
    parts = _part_counts(start, length, offset, whole, window, split)
    return Tasks(np.concatenate(records), np.concatenate(([0], np.cumsum(parts))).astype(np.int32), rows)


def _height(longest: int, group: int, invariant: bool) -> int:
    """Rows of a tile: the smallest power of two that serves."""
    least, some, most = _HEIGHTS
    if invariant:
        height = some
    elif longest * group >= _WHOLE_HEIGHT:
        height = most
    else:
        height = min(max(longest, _TOKENS) * group, some)
    return 1 << (max(least, height, group) - 1).bit_length()


def _first_seen(position: Ints, window: int | None) -> Ints:
    return np.zeros_like(position) if window is None else np.maximum(position - window + 1, 0)


def _tiles(begin: Ints, count: Ints, size: int) -> tuple[Ints, Ints, Ints]:
    """Ranges of `count` numbers from `begin` on, in tiles of `size`: the first number, the range and the numbers of each."""
    tiles = -(-count // size)
    if len(tiles) == tiles.sum():
        return begin, np.arange(len(begin)), count
    tile, which = _numbers(np.zeros_like(count), tiles)
    return begin[which] + tile * size, which, np.minimum(size, count[which] - tile * size)


def _numbers(begin: Ints, count: Ints) -> tuple[Ints, Ints]:
    """Ranges of `count` numbers from `begin` on, one after another: the numbers, and the range of each."""
    which = np.repeat(np.arange(len(count)), count)
    return np.arange(len(which)) - (np.cumsum(count) - count - begin)[which], which


def _part_counts(start: Ints, length: Ints, offset: Ints, whole: NDArray[np.bool_], window: int | None, split: int) -> Ints:
    """Partial results of every token: one for each split that it sees, if there are several."""
    position = np.arange(offset[-1]) + np.repeat(start - offset[:-1], length)
    further = position // split - _first_seen(position, window) // split
    return np.where(np.repeat(whole, length) | (further == 0), 0, further + 1)


def _shared(start: Ints, whole: NDArray[np.bool_], trunk: Ints, block_size: int, split: int) -> Ints:
    """The runs [S, 3] that share whole splits: first row, rows, and the key behind those splits."""
    trunk = trunk[trunk[:, 1] > 1]
    if not len(trunk):
        return np.empty((0, 3), np.int64)
    first, rows, blocks = trunk.T.astype(np.int64)
    edges = np.stack((first, first + rows), 1).ravel()
    nearest = np.minimum.reduceat(np.append(np.where(whole, 0, start), 0), edges)[::2]
    end = np.minimum(blocks * block_size, nearest) // split * split
    shared: Ints = np.stack((first, rows, end), 1)[end > 0]
    return shared


def _shared_spans(shared: Ints, slot: Ints, start: Ints, offset: Ints, tile: int, window: int | None) -> _Spans:
    """What runs walk through as one, in the table of their first row."""
    first, rows, end = shared.T
    begin = offset[first]
    token, which, tokens = _tiles(begin, offset[first + rows] - begin, tile)
    if window is None:
        seen = np.zeros_like(token)
    else:  # of neighbours, the one that sees most
        each, _ = _numbers(token, tokens)
        row = np.searchsorted(offset, each, "right") - 1
        seen = np.minimum.reduceat(_first_seen(start[row] + each - offset[row], window), np.cumsum(tokens) - tokens)
    return _Spans(token, tokens, slot[first[which]], seen, end[which])


def _split_tasks(spans: _Spans, split: int) -> NDArray[np.int32]:
    """Records of a task for every split that a span touches."""
    low, high = spans.first // split, -(-spans.end // split)
    cut, which = _numbers(low, np.maximum(high - low, 0))
    first, end = np.maximum(cut * split, spans.first[which]), np.minimum(cut * split + split, spans.end[which])
    return _records(_Spans(spans.token[which], spans.tokens[which], spans.slot[which], first, end), whole=False)


def _whole_tasks(spans: _Spans) -> NDArray[np.int32]:
    return _records(_picked(spans, np.argsort(spans.first - spans.end, kind="stable")), whole=True)


def _picked(spans: _Spans, which: NDArray[Any]) -> _Spans:
    return _Spans(*(field[which] for field in spans))


def _records(spans: _Spans, *, whole: bool) -> NDArray[np.int32]:
    records = np.empty((len(spans.token), WORDS), np.int32)
    for column, field in enumerate(spans):
        records[:, column] = field
    records[:, -1] = whole
    return records

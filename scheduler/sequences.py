"""All sequences of the scheduler as one table, so that a step costs array operations, not objects."""

from __future__ import annotations

import numpy as np

from .plan import Bools, Ints, Longs

NO_CAP = np.iinfo(np.int32).max
_FEW = 16  # arrays of fewer elements are written one by one
_FIELDS = [
    ("birth", np.int64), ("era", np.int64), ("stream", np.int64),
    ("group", np.int32), ("slot", np.int32), ("known", np.int32), ("scheduled", np.int32), ("computed", np.int32),
    ("pending", np.int32), ("probed", np.int32), ("cap", np.int32), ("limit", np.int32), ("last", np.int32), ("node", np.int32),
    ("trunk", np.int32), ("cols", np.int32), ("published", np.int32), ("outdated", np.int32), ("row", np.int32),
    ("alive", np.bool_), ("run", np.bool_), ("pipelined", np.bool_),
]  # fmt: skip
_BLANK = np.zeros((), _FIELDS)
_BLANK["slot"] = _BLANK["node"] = -1
_BLANK["cap"] = _BLANK["outdated"] = NO_CAP
_RAW = np.dtype((np.void, _BLANK.itemsize))


class Sequences:
    """Columns by sequence id. Ids are reused; `birth` tells one user of an id from the next.

    known: tokens that exist; scheduled: positions that plans cover; computed: positions whose KV a finished
    step has written; pending: tokens drawn in a step not applied yet; probed: length at which the last
    read-out was planned; cap: positions beyond it are not planned yet. `run`: rows are wanted; a sequence with
    blocks and no slot (-1) is parked. tail[:, :cols] are its blocks after the group's `trunk` ones; of `published`
    leading blocks it was seen to that they are in the prefix cache. From column `outdated` on the runner's table holds
    other blocks than this one. `row` is its row in the plan being made. `era` counts evictions: a step planned before one
    has written into blocks that are no longer the sequence's.
    """

    alive: Bools
    run: Bools
    pipelined: Bools
    birth: Longs
    era: Longs
    stream: Longs
    group: Ints
    slot: Ints
    known: Ints
    scheduled: Ints
    computed: Ints
    pending: Ints
    probed: Ints
    cap: Ints
    limit: Ints
    last: Ints
    node: Ints
    trunk: Ints
    cols: Ints
    published: Ints
    outdated: Ints
    row: Ints

    def __init__(self, capacity: int = 256, columns: int = 8) -> None:
        self._size = capacity, columns
        self._births = 0
        self.tail: Ints
        self.shrink()

    def __len__(self) -> int:
        return len(self._rows) - len(self._free)

    def shrink(self) -> None:
        """Back to the size of the beginning, where nothing lives: every step looks at all rows."""
        capacity, columns = self._size
        self._rows = np.full(capacity, _BLANK)
        self.tail = np.zeros((capacity, columns), np.int32)
        self._free = list(range(capacity - 1, -1, -1))  # a stack
        self._view()

    def _view(self) -> None:
        for name, _ in _FIELDS:
            setattr(self, name, self._rows[name])
        self._raw = self._rows.view(_RAW)  # whole rows are copied many times faster where numpy sees no fields

    def allocate(self, count: int, group: int) -> list[int]:
        """`count` ids that live from now on in a group, with no blocks, no slot and nothing known."""
        while len(self._free) < count:
            self._grow()
        ids, birth = self._free[: -count - 1 : -1], self._births
        del self._free[len(self._free) - count :]
        self._births += count
        if count > _FEW:
            self.birth[ids], self.alive[ids], self.group[ids] = range(birth + 1, self._births + 1), True, group
            return ids
        for seq in ids:
            birth += 1
            self.birth[seq], self.alive[seq], self.group[seq] = birth, True, group
        return ids

    def free(self, ids: Ints) -> None:
        """The ids may be used again; their blocks and slots were released before."""
        self._raw[ids] = _BLANK.view(_RAW)
        self._free += ids[::-1].tolist()

    def fork(self, src: Ints, dst: Ints) -> None:
        """dst become copies of src, sharing their blocks; references, slots and streams are the caller's."""
        births = self.birth[dst]
        self._raw[dst] = self._raw[src]
        self.birth[dst] = births
        self.slot[dst] = -1
        width = int(self.cols[src].max(initial=0))
        self.tail[dst, :width] = self.tail[src, :width]

    def of(self, group: int) -> Ints:
        """The live sequences of a group, by its number."""
        return np.flatnonzero((self.group == group) & self.alive).astype(np.int32)

    def blocks(self, ids: Ints) -> Ints:
        """The tail blocks of the given sequences, one after another, each in table order."""
        width = int(self.cols[ids].max(initial=0))
        tails = self.tail[ids, :width]
        return tails[np.arange(width) < self.cols[ids, None]]

    def reserve_columns(self, columns: int) -> None:
        """Make room for tails of `columns` blocks."""
        have = self.tail.shape[1]
        if columns > have:
            more = np.zeros((self.tail.shape[0], max(columns, 2 * have) - have), np.int32)
            self.tail = np.concatenate([self.tail, more], axis=1)

    def _grow(self) -> None:
        old = len(self._rows)
        self._rows = np.concatenate([self._rows, np.full_like(self._rows, _BLANK)])
        self.tail = np.concatenate([self.tail, np.zeros_like(self.tail)])
        self._free[:0] = range(2 * old - 1, old - 1, -1)
        self._view()


def within(counts: Ints) -> Ints:
    """0, 1, ... count - 1 for each count, one after another."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int32) - np.repeat(ends - counts, counts)


def edges(numbers: Ints) -> list[int]:
    """Where runs of equal numbers begin, and where the last one ends."""
    if not len(numbers):
        return [0]
    return [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]


def tally(numbers: Ints) -> list[tuple[int, int]]:
    """Each number and how often it is there."""
    found, counts = np.unique(numbers, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))

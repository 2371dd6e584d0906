"""All sequences of the scheduler as one structure of arrays, so that a step costs array operations, not objects."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .plan import Bools, Ints, Longs

NO_CAP = np.iinfo(np.int32).max


class Sequences:
    """Columns by sequence id. Ids are reused; `birth` tells one user of an id from the next.

    known: tokens that exist; scheduled: positions that plans cover; computed: positions whose KV a finished
    step has written; pending: tokens drawn in a step not applied yet; probed: length at which the last
    read-out was planned; cap: positions beyond it are not planned yet. A sequence with blocks and no slot (-1) is parked.
    tail[:, :cols] are its blocks after the group's `trunk` ones, `published` leading blocks are in the prefix
    cache. `row` is its row in the plan being made. `era` counts evictions: a step planned before one
    has written into blocks that are no longer the sequence's.
    """

    _COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        "alive": np.bool_, "run": np.bool_, "group": np.int32, "slot": np.int32, "stream": np.int64,
        "known": np.int32, "scheduled": np.int32, "computed": np.int32, "pending": np.int32,
        "probed": np.int32, "cap": np.int32, "limit": np.int32, "last": np.int32, "node": np.int32,
        "trunk": np.int32, "cols": np.int32, "published": np.int32,
        "birth": np.int64, "era": np.int64, "row": np.int32, "pipelined": np.bool_,
    }  # fmt: skip
    alive: Bools
    run: Bools
    group: Ints
    slot: Ints
    stream: Longs
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
    birth: Longs
    era: Longs
    row: Ints
    pipelined: Bools

    def __init__(self, capacity: int = 256, columns: int = 8) -> None:
        for name, dtype in self._COLUMNS.items():
            setattr(self, name, np.zeros(capacity, dtype))
        self.tail: Ints = np.zeros((capacity, columns), np.int32)
        self._free = list(range(capacity - 1, -1, -1))
        self._births = 0

    def __len__(self) -> int:
        return len(self.alive) - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` ids that live from now on, with no blocks, no slot and nothing known."""
        while len(self._free) < count:
            self._grow_rows()
        ids = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        for name in self._COLUMNS:
            if name != "era":
                getattr(self, name)[ids] = 0
        self.alive[ids] = True
        self.slot[ids] = -1
        self.node[ids] = -1
        self.cap[ids] = NO_CAP
        self.birth[ids] = np.arange(self._births + 1, self._births + 1 + count)
        self._births += count
        return ids

    def free(self, ids: Ints) -> None:
        """The ids may be used again; their blocks and slots were released before."""
        self.alive[ids] = False
        self.birth[ids] = 0
        self._free.extend(ids.tolist())

    def fork(self, src: Ints, dst: Ints) -> None:
        """dst become copies of src, sharing their blocks; references, slots and streams are the caller's."""
        for name in ("group", "known", "scheduled", "computed", "pending", "probed", "cap", "limit", "last", "node", "trunk",
                     "cols", "published", "run", "pipelined"):  # fmt: skip
            column = getattr(self, name)
            column[dst] = column[src]
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

    def _grow_rows(self) -> None:
        old = len(self.alive)
        for name in self._COLUMNS:
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self.tail = np.concatenate([self.tail, np.zeros_like(self.tail)])
        self._free = list(range(2 * old - 1, old - 1, -1)) + self._free

"""Slots: the runner's places for the state of sequences whose rows are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.ma  # np.unique would import it at its first call, when no file may be opened any more

from .plan import Bools, Forks, Ints, Longs, ints
from .sequences import Sequences


class Slots:
    """Hands out slots and remembers what the next plan must say about them."""

    def __init__(self, count: int, table: Sequences) -> None:
        self._table = table
        self._free: Ints = np.arange(count - 1, -1, -1, dtype=np.int32)  # a stack: the first `free` entries
        self.free = count
        self._closed = np.zeros(count, np.bool_)
        self._fresh = np.zeros(count, np.bool_)  # handed out since the last plan: what is to be in them is not there yet
        self._forks: list[tuple[Ints, Ints, Longs]] = []  # source slots, sequences, their births
        self._opens: list[tuple[Ints, Longs]] = []  # sequences, their births

    def open(self, seqs: Ints) -> None:
        """A slot for each sequence, its state sent with the next plan."""
        if len(seqs):
            self._take(seqs)
            self._opens.append((seqs, self._table.birth[seqs]))

    def fork(self, sources: Ints, dst: Ints) -> None:
        """A slot for each dst, its state copied from the source slot, or sent where that is -1 or has no state yet."""
        copied = (sources >= 0) & ~self._fresh[sources]
        if not copied.all():
            self.open(dst[~copied])
            sources, dst = sources[copied], dst[copied]
        if len(dst):
            self._take(dst)
            self._forks.append((sources, dst, self._table.birth[dst]))

    def forget(self) -> None:
        """No sequence lives: there is nothing to open or to fork any more."""
        self._forks, self._opens = [], []

    def close(self, seqs: Ints) -> None:
        """The sequences need no slot any more."""
        slots = self._table.slot[seqs]
        slots = slots[slots >= 0]
        self._free[self.free : self.free + len(slots)] = slots
        self.free += len(slots)
        self._closed[slots] = True
        self._table.slot[seqs] = -1

    def _take(self, seqs: Ints) -> None:
        if len(seqs) > self.free:
            raise RuntimeError("no slot is free: a strategy runs more sequences than its footprint says")
        self.free -= len(seqs)
        slots = self._free[self.free : self.free + len(seqs)][::-1]
        self._closed[slots] = False
        self._fresh[slots] = True
        self._table.slot[seqs] = slots

    def drain(self) -> tuple[Forks, Ints, Ints]:
        """Forks, closes and sequences to open since the last plan, less what has ended meanwhile."""
        opens = sources = seqs = ints()
        if self._opens:
            opens, births = _joined(self._opens)
            opens = np.unique(opens[self._stands(opens, births)])
        if self._forks:
            sources, seqs, births = _joined(self._forks)
            # What was evicted after the fork is opened instead.
            keep = self._stands(seqs, births) & ~np.isin(seqs, opens)
            sources, seqs = sources[keep], seqs[keep]
        closes = ints(np.flatnonzero(self._closed))
        self._forks, self._opens = [], []
        self._closed[closes] = False
        self._fresh[:] = False
        return Forks(sources, self._table.slot[seqs], self._table.stream[seqs]), closes, opens

    def _stands(self, seqs: Ints, births: Longs) -> Bools:
        """Which of the sequences still live and have a slot."""
        found: Bools = (self._table.birth[seqs] == births) & (self._table.slot[seqs] >= 0)
        return found


def _joined(parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The first, second, ... arrays of all parts, each joined."""
    return [np.concatenate(column) for column in zip(*parts, strict=True)]

"""Slots: the runner's places for the state of sequences whose rows are computed."""

from __future__ import annotations

from .plan import Forks, Ints, ints
from .sequences import Sequences
from .strategies.base import Ids


class Slots:
    """Hands out slots and remembers what the next plan must say about them."""

    def __init__(self, count: int, table: Sequences) -> None:
        self._table = table
        self._free = list(range(count - 1, -1, -1))
        self._closed: set[int] = set()
        self._forks: list[tuple[int, int, int]] = []  # src slot, seq, its birth
        self._opens: list[tuple[int, int]] = []  # seq, its birth

    @property
    def free(self) -> int:
        return len(self._free)

    def open(self, seqs: Ids) -> None:
        """A slot for each sequence, its state sent with the next plan."""
        for seq in seqs:
            self._take(int(seq))
            self._opens.append((int(seq), int(self._table.birth[seq])))

    def fork(self, sources: Ints, dst: list[int]) -> None:
        """A slot for each dst, its state copied from the source slot, or sent where that is -1."""
        births = self._table.birth
        for slot, seq in zip(sources.tolist(), dst, strict=True):
            if slot < 0:
                self.open([seq])
            else:
                self._take(seq)
                self._forks.append((slot, seq, int(births[seq])))

    def close(self, seqs: Ints) -> None:
        """The sequences need no slot any more."""
        slots = self._table.slot[seqs]
        slots = slots[slots >= 0].tolist()
        self._free.extend(slots)
        self._closed.update(slots)
        self._table.slot[seqs] = -1

    def _take(self, seq: int) -> None:
        if not self._free:
            raise RuntimeError("no slot is free: a strategy runs more sequences than its footprint says")
        slot = self._free.pop()
        self._closed.discard(slot)
        self._table.slot[seq] = slot

    def drain(self) -> tuple[Forks, Ints, list[int]]:
        """Forks, closes and sequences to open since the last plan, less what has ended meanwhile."""
        table = self._table
        forks = [(src, seq) for src, seq, birth in self._forks if table.birth[seq] == birth and table.slot[seq] >= 0]
        opens = dict.fromkeys(seq for seq, birth in self._opens if table.birth[seq] == birth and table.slot[seq] >= 0)
        forks = [(src, seq) for src, seq in forks if seq not in opens]  # evicted after the fork: opened instead
        seqs = ints([seq for _, seq in forks])
        closes = ints(sorted(self._closed))
        self._forks, self._opens, self._closed = [], [], set()
        return Forks(ints([src for src, _ in forks]), table.slot[seqs], table.stream[seqs]), closes, list(opens)

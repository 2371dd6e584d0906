"""Asking each strategy what to read off the rows of a step, and collecting that into the probes of its plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .edits import fork_now
from .group import Group
from .kv_manager import KVManager
from .plan import Ints, Kind, Probe, ints
from .slots import Slots
from .strategies.base import Ids, Read

if TYPE_CHECKING:
    from .planning import Chosen

_NARROW = 64  # up to this width a group's sequences are given as a list: arrays of few elements are slow


class Cut(NamedTuple):
    """Where one Read stands: entries [begin, end) of a probe, and rows [first, last) of what it finds, n columns wide."""

    probe: int
    begin: int
    end: int
    n: int
    first: int
    last: int


# What one group reads in a step: for which sequences, off how many rows, where each of its Reads stands, and which
# children were forked for it.
Segment = tuple[Group, Ids, int, list[Cut], list[int]]


class Entries:
    """Concatenates lists and arrays of ids cheaply: few arrays, many short lists."""

    def __init__(self) -> None:
        self.size = 0
        self._arrays: list[Ints] = []
        self._list: list[int] = []

    def add(self, ids: Ids) -> tuple[int, int]:
        begin = self.size
        end = self.size = begin + len(ids)
        if type(ids) is np.ndarray:
            self._arrays += [ints(self._list), ids]
            self._list = []
        else:
            self._list += ids
        return begin, end

    def array(self) -> Ints:
        return np.concatenate([*self._arrays, ints(self._list)])


_SAMPLE = Kind.SAMPLE
_OPTIONAL = ("window", "bias")
_Key = tuple[int, bool, int, tuple[str, ...]]


class _Collected:
    """The Reads that go into one probe: of one kind, with the same optional fields."""

    def __init__(self, kind: Kind, fields: tuple[str, ...], probe: int) -> None:
        self.kind = kind
        self.fields = fields
        self.probe = probe
        self.groups = 0
        self.at = Entries()
        self.forks: list[tuple[int, int, Ids]] = []  # entries that are read for other sequences than those they read at
        self.reads: list[Read] = []

    def table(self, kv: KVManager, offset: Ints) -> Probe:
        at, reads = self.at.array(), self.reads
        seqs = at.copy()
        for begin, end, forked in self.forks:
            seqs[begin:end] = forked
        extra: dict[str, Any] = {name: np.concatenate([getattr(read, name) for read in reads]) for name in self.fields}
        if reads[0].groups is not None:
            begins = np.cumsum([0, *(len(read.at) for read in reads)])
            parts = [read.groups[1:] + begin for read, begin in zip(reads, begins, strict=False) if read.groups is not None]
            extra["groups"] = ints(np.concatenate([[0], *parts]))
        n = max(read.n for read in reads)
        return Probe(self.kind, offset[kv.table.row[at] + 1] - 1, kv.table.slot[seqs], n, reads[0].processed, **extra)


class ProbeTable:
    """Collects the Reads of all groups into few Probes, each of one kind and set of optional fields."""

    def __init__(self) -> None:
        self._found: dict[_Key, _Collected] = {}
        self._order: list[_Collected] = []

    def add(self, read: Read) -> Cut:
        """Where the read's entries stand."""
        fields = () if read.kind is _SAMPLE else tuple(name for name in _OPTIONAL if getattr(read, name) is not None)
        # Searches of one width are merged together: the columns of a wide one are not spent on narrow ones.
        key = (int(read.kind), read.processed, read.n if read.groups is not None else 0, fields)
        collected = self._found.get(key)
        if collected is None:
            collected = self._found[key] = _Collected(read.kind, fields, len(self._order))
            self._order.append(collected)
        collected.reads.append(read)
        begin, end = collected.at.add(read.at)
        if read.seqs is not None:
            collected.forks.append((begin, end, read.seqs))
        if read.groups is None:
            return Cut(collected.probe, begin, end, read.n, begin, end)
        first = collected.groups
        collected.groups += len(read.groups) - 1
        return Cut(collected.probe, begin, end, read.n, first, collected.groups)

    def probes(self, kv: KVManager, offset: Ints) -> list[Probe]:
        return [collected.table(kv, offset) for collected in self._order]


class Asked(NamedTuple):
    """What a step reads: by group, and for which sequences in all; `children` were forked for it.

    broken: groups whose strategy raised.
    """

    segments: list[Segment]
    seqs: Ints
    children: Ints
    broken: list[tuple[Group, BaseException]]


def ask(chosen: Chosen, groups: dict[int, Group], kv: KVManager, slots: Slots, probes: ProbeTable) -> Asked:
    """Ask each strategy what to read off its complete rows, and collect it in `probes`."""
    table = kv.table
    target = table.known[chosen.seqs] + table.pending[chosen.seqs]
    complete = chosen.seqs[(chosen.end == target) & (table.probed[chosen.seqs] < target)]
    owners = table.group[complete]
    edges = np.flatnonzero(np.diff(owners, prepend=-1, append=-1)).tolist()
    ids, numbers = complete.tolist(), owners[edges[:-1]].tolist()
    segments: list[Segment] = []
    read_for = Entries()
    children: list[int] = []
    broken: list[tuple[Group, BaseException]] = []
    for number, begin, end in zip(numbers, edges, edges[1:], strict=False):
        group = groups[number]
        try:
            reads = group.strategy.probe(group, ids[begin:end] if end - begin < _NARROW else complete[begin:end])
            parts = []
            forked: list[int] = []
            for read in reads:
                if read.seqs is not None:
                    forked += fork_now(kv, slots, group, read)
                parts.append(probes.add(read))
        except BaseException as error:  # noqa: BLE001 - a strategy's bug ends its own request only
            broken.append((group, error))
            continue
        seqs = reads[0].at if reads[0].seqs is None else reads[0].seqs
        read_for.add(seqs)
        children += forked
        segments.append((group, seqs, end - begin, parts, forked))
    return Asked(segments, read_for.array(), ints(children), broken)

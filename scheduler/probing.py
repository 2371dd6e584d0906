"""Asking each strategy what to read off the rows of a step, and collecting that into the probes of its plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .edits import fork_now
from .group import Group
from .kv_manager import KVManager
from .plan import Ints, Kind, Probe, flat, ints
from .sequences import edges
from .slots import Slots
from .strategies.base import Ids, Read

if TYPE_CHECKING:
    from .planning import Chosen

_NARROW = 64  # up to this width a group's sequences are given as a list: arrays of few elements are slow


class Cut(NamedTuple):
    """Where one Read stands: entries [begin, end) of a probe, and rows [first, last) of what it finds, n columns wide.

    merged: it is a MERGE of one group.
    """

    probe: int
    begin: int
    end: int
    n: int
    first: int
    last: int
    merged: bool = False


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


_Key = tuple[int, bool, int, bool, bool]
_MERGE = int(Kind.MERGE)
_SAMPLES: _Key = (int(Kind.SAMPLE), False, 0, True, True)


class _Collected:
    """The Reads that go into one probe: of one kind, with the same optional fields."""

    def __init__(self, probe: int) -> None:
        self.probe = probe
        self.groups = 0
        self.at = Entries()
        self.forks: list[tuple[int, int, Ids]] = []  # entries that are read for other sequences than those they read at
        self.reads: list[Read] = []

    def table(self, kv: KVManager, offset: Ints) -> Probe:
        at, reads, first = self.at.array(), self.reads, self.reads[0]
        seqs = at
        if self.forks:
            seqs = at.copy()
            for begin, end, forked in self.forks:
                seqs[begin:end] = forked
        probe = Probe(first.kind, offset[kv.table.row[at] + 1] - 1, kv.table.slot[seqs], first.n, first.processed)
        if first.window is not None:
            probe.window = flat([read.window for read in reads if read.window is not None])
        if first.kind is Kind.MERGE:
            probe.bias = flat([read.bias for read in reads if read.bias is not None], np.float32)
            bounds = [0]
            for read in reads:
                begin = bounds[-1]
                bounds += [begin + len(read.at)] if read.groups is None else [begin + edge for edge in read.groups[1:]]
            probe.groups = ints(bounds)
        else:
            probe.n = max(read.n for read in reads)
        return probe


class ProbeTable:
    """Collects the Reads of all groups into few Probes, each of one kind and set of optional fields."""

    def __init__(self) -> None:
        self._found: dict[_Key, _Collected] = {}
        self._order: list[_Collected] = []

    def add(self, read: Read) -> Cut:
        """Where the read's entries stand."""
        groups, n = read.groups, read.n
        kind = int(read.kind)
        merge = kind == _MERGE
        # Searches of one width are merged together: the columns of a wide one are not spent on narrow ones.
        key = (kind, read.processed, n if merge else 0, groups is None, read.window is None) if kind else _SAMPLES
        collected = self._found.get(key)
        if collected is None:
            collected = self._found[key] = _Collected(len(self._order))
            self._order.append(collected)
        collected.reads.append(read)
        begin, end = collected.at.add(read.at)
        if read.seqs is not None:
            collected.forks.append((begin, end, read.seqs))
        if not merge:
            return Cut(collected.probe, begin, end, n, begin, end)
        first = collected.groups
        collected.groups = last = first + (1 if groups is None else len(groups) - 1)
        return Cut(collected.probe, begin, end, n, first, last, groups is None)

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
    bounds = edges(owners)
    ids, numbers = complete.tolist(), owners[bounds[:-1]].tolist() if len(owners) else []
    segments: list[Segment] = []
    read_for = Entries()
    children: list[int] = []
    broken: list[tuple[Group, BaseException]] = []
    for number, begin, end in zip(numbers, bounds, bounds[1:], strict=False):
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

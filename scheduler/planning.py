"""From chosen rows to the arrays of a Plan."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .group import Group
from .kv_manager import KVManager, Written
from .plan import LAST_TOKEN, Copies, Ints, Kind, Opens, Plan, Probe, Rows, Spec, Tables, ints
from .slots import Slots
from .strategies.base import Ids, Read


class Chosen(NamedTuple):
    """Rows to compute, sorted so that a group's rows stand together: positions [start, end) of each sequence."""

    seqs: Ints
    start: Ints
    end: Ints

    def where(self, keep: Ints) -> Chosen:
        return Chosen(self.seqs[keep], self.start[keep], self.end[keep])


# What one group reads in a step: for which sequences and, per Read, (index of the probe, begin, end, n).
Segment = tuple[Group, Ids, list[tuple[int, int, int, int]]]


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
_OPTIONAL = ("groups", "keep", "bias", "similarity", "mask")


class _Collected:
    """The Reads of one kind with the same optional fields."""

    def __init__(self, kind: Kind, fields: tuple[str, ...], probe: int) -> None:
        self.kind = kind
        self.fields = fields
        self.probe = probe
        self.at = Entries()
        self.forks: list[tuple[int, int, Ids]] = []  # entries that are read for other sequences than those they read at
        self.reads: list[Read] = []

    def table(self, kv: KVManager, offset: Ints) -> Probe:
        at, reads = self.at.array(), self.reads
        seqs = at.copy()
        for begin, end, forked in self.forks:
            seqs[begin:end] = forked
        extra: dict[str, Any] = {name: np.concatenate([getattr(read, name) for read in reads]) for name in self.fields}
        n = max(read.n for read in reads)
        return Probe(self.kind, offset[kv.table.row[at] + 1] - 1, kv.table.slot[seqs], n, **extra)


class ProbeTable:
    """Collects the Reads of all groups into one Probe per kind and set of optional fields."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, tuple[str, ...]], _Collected] = {}
        self._order: list[_Collected] = []

    def add(self, read: Read) -> tuple[int, int, int, int]:
        """Where the read's entries stand: (probe, begin, end, n)."""
        fields = () if read.kind is _SAMPLE else tuple(name for name in _OPTIONAL if getattr(read, name) is not None)
        key = (int(read.kind), fields)
        collected = self._found.get(key)
        if collected is None:
            collected = self._found[key] = _Collected(read.kind, fields, len(self._order))
            self._order.append(collected)
        collected.reads.append(read)
        begin, end = collected.at.add(read.at)
        if read.seqs is not None:
            collected.forks.append((begin, end, read.seqs))
        return collected.probe, begin, end, read.n

    def probes(self, kv: KVManager, offset: Ints) -> list[Probe]:
        return [collected.table(kv, offset) for collected in self._order]


def tokens_of(chosen: Chosen, kv: KVManager, groups: dict[int, Group]) -> tuple[Ints, Ints]:
    """Rows.offset and Rows.tokens of the chosen rows."""
    table = kv.table
    lengths = chosen.end - chosen.start
    offset = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offset[1:])
    tokens = np.empty(int(offset[-1]), np.int32)
    single = lengths == 1
    known = table.known[chosen.seqs]
    tokens[offset[:-1]] = np.where(chosen.start >= known, LAST_TOKEN, table.last[chosen.seqs])
    # What is neither the last known token nor beyond it comes from the history.
    for row in np.flatnonzero(~single | (chosen.start < known - 1)).tolist():
        seq, begin, end = int(chosen.seqs[row]), int(chosen.start[row]), int(chosen.end[row])
        have = min(end, int(known[row]))
        group = groups[int(table.group[seq])]
        tokens[offset[row] : offset[row] + have - begin] = group.history(seq, begin, have)
        tokens[offset[row] + have - begin : offset[row + 1]] = LAST_TOKEN
    return offset, tokens


def shared_runs(chosen: Chosen, kv: KVManager) -> Ints:
    """Rows.trunk: runs of at least two neighbouring rows of a group whose trunk is not empty."""
    groups = kv.table.group[chosen.seqs]
    edges = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    first, count = edges[:-1], np.diff(edges)
    blocks = kv.table.trunk[chosen.seqs[first]] if len(first) else first
    keep = (count > 1) & (blocks > 0)
    return ints(np.stack([first[keep], count[keep], blocks[keep]], axis=1))


def opening(seqs: list[int], kv: KVManager, groups: dict[int, Group]) -> tuple[Opens, list[Spec], list[Tables]]:
    """State of sequences that get a slot without a fork: spec, stream, history where it counts, whole table."""
    table = kv.table
    specs: dict[int, int] = {}
    spec_list: list[Spec] = []
    begin, end, parts, tables = [], [], [], []
    spans: dict[tuple[int, int], tuple[int, int]] = {}
    size = 0
    for seq in seqs:
        group = groups[int(table.group[seq])]
        if group.number not in specs:
            specs[group.number] = len(spec_list)
            spec_list.append(group.request.spec)
        span = (0, 0)
        if group.request.spec.history:
            key = (group.number, int(table.node[seq]))  # siblings that share all tokens share the span
            if key not in spans:
                parts.append(group.history(seq))
                spans[key] = (size, size + len(parts[-1]))
                size += len(parts[-1])
            span = spans[key]
        begin.append(span[0])
        end.append(span[1])
        blocks = np.concatenate([ints(group.trunk), table.tail[seq, : table.cols[seq]]])
        tables.append(Tables(np.full(len(blocks), table.slot[seq]), ints(np.arange(len(blocks))), blocks))
    numbers = ints([specs[int(table.group[seq])] for seq in seqs])
    ids = ints(seqs)
    tokens = np.concatenate([ints(), *parts])
    return Opens(table.slot[ids], numbers, table.stream[ids], ints(begin), ints(end), tokens), spec_list, tables


def assemble(
    step: int, written: Written, probes: ProbeTable, kv: KVManager, slots: Slots, groups: dict[int, Group], rows: Rows
) -> Plan:
    """Put the parts together; `rows` hold what was decided before the probes forked anything."""
    table = kv.table
    forks, closes, opened = slots.drain()
    opens, specs, tables = opening(opened, kv, groups)
    for seqs, columns, blocks in (kv.take_replaced(), (written.seq, written.column, written.block)):
        tables.append(Tables(table.slot[seqs], columns, blocks))
    deltas = Tables(
        np.concatenate([part.slot for part in tables], dtype=np.int32),
        np.concatenate([part.column for part in tables], dtype=np.int32),
        np.concatenate([part.block for part in tables], dtype=np.int32),
    )
    return Plan(step, specs, forks, closes, opens, deltas, Copies(written.src, written.dst), rows, probes.probes(kv, rows.offset))


__all__ = ["Chosen", "Entries", "ProbeTable", "Segment", "assemble", "shared_runs", "tokens_of"]

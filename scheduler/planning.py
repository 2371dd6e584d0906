"""From chosen rows to the arrays of a Plan."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .group import Group
from .kv_manager import KVManager, Written
from .plan import LAST_TOKEN, Copies, Ints, Opens, Plan, Rows, Spec, Tables, ints
from .probing import ProbeTable
from .slots import Slots


class Chosen(NamedTuple):
    """Rows to compute, sorted so that a group's rows stand together: positions [start, end) of each sequence."""

    seqs: Ints
    start: Ints
    end: Ints

    def where(self, keep: Ints) -> Chosen:
        return Chosen(self.seqs[keep], self.start[keep], self.end[keep])


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

"""From chosen rows to the arrays of a Plan."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .group import Group
from .kv_manager import KVManager, Written
from .plan import LAST_TOKEN, Copies, Ints, Opens, Plan, Rows, Spec, Tables, ints
from .probing import ProbeTable
from .sequences import edges, within
from .slots import Slots

_NO_RUNS: Ints = np.empty((0, 3), np.int32)
_NO_OPENS = Opens(ints(), ints(), np.empty(0, np.int64), ints(), ints(), ints())


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
    bounds = ints(edges(groups))
    first, count = bounds[:-1], bounds[1:] - bounds[:-1]
    several = count > 1
    if not several.any():
        return _NO_RUNS
    blocks = kv.table.trunk[chosen.seqs[first]]
    keep = several & (blocks > 0)
    return np.stack([first[keep], count[keep], blocks[keep]], axis=1)


def opening(seqs: Ints, kv: KVManager, groups: dict[int, Group]) -> tuple[Opens, list[Spec], Tables]:
    """State of sequences that get a slot without a fork: spec, stream, history where it counts, whole table."""
    table = kv.table
    numbers, spec_of = np.unique(table.group[seqs], return_inverse=True)
    specs = [groups[number].request.spec for number in numbers.tolist()]
    spans, tokens = _histories(seqs, kv, groups)
    trunks = [ints(groups[number].trunk) for number in numbers.tolist()]
    heads, cols = table.trunk[seqs], table.cols[seqs]
    column = within(heads + cols)
    in_trunk = column < np.repeat(heads, heads + cols)
    blocks = np.empty_like(column)
    blocks[in_trunk] = np.concatenate([trunks[i] for i in spec_of.tolist()])
    blocks[~in_trunk] = table.blocks(seqs)
    tables = Tables(np.repeat(table.slot[seqs], heads + cols), column, blocks)
    return Opens(table.slot[seqs], ints(spec_of), table.stream[seqs], spans[:, 0], spans[:, 1], tokens), specs, tables


def _histories(seqs: Ints, kv: KVManager, groups: dict[int, Group]) -> tuple[Ints, Ints]:
    """The tokens of sequences whose spec needs them, and where those of each begin and end: [P, 2]."""
    table, size = kv.table, 0
    parts: list[Ints] = []
    spans = np.zeros((len(seqs), 2), np.int32)
    known: dict[tuple[int, int], tuple[int, int]] = {}
    for i, (seq, number, node) in enumerate(
        zip(seqs.tolist(), table.group[seqs].tolist(), table.node[seqs].tolist(), strict=True)
    ):
        if groups[number].request.spec.history:
            if (number, node) not in known:  # siblings that share all tokens share the span
                parts.append(groups[number].history(seq))
                known[number, node] = size, size + len(parts[-1])
                size += len(parts[-1])
            spans[i] = known[number, node]
    return spans, np.concatenate([ints(), *parts])


def assemble(
    step: int, written: Written, probes: ProbeTable, kv: KVManager, slots: Slots, groups: dict[int, Group], rows: Rows
) -> Plan:
    """Put the parts together; `rows` hold what was decided before the probes forked anything."""
    table = kv.table
    forks, closes, opened = slots.drain()
    deltas = Tables(table.slot[written.seq], ints(written.column), written.block)
    opens, specs = _NO_OPENS, list[Spec]()
    if len(opened):
        opens, specs, whole = opening(opened, kv, groups)
        deltas = _both(whole, deltas)
    if kv.replaced:
        seqs, columns, blocks = kv.take_replaced(groups)
        deltas = _both(Tables(table.slot[seqs], columns, blocks), deltas)
    return Plan(step, specs, forks, closes, opens, deltas, Copies(written.src, written.dst), rows, probes.probes(kv, rows.offset))


def _both(first: Tables, second: Tables) -> Tables:
    return Tables(*(np.concatenate([getattr(part, name) for part in (first, second)]) for name in Tables.__struct_fields__))

"""Cutting the reads of a step into what each group asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .group import Group
from .plan import Ints, Longs, Reads, flat
from .probing import Cut, Segment
from .scoring import Part
from .strategies.base import Ids, Merged, Samples

_FIELDS = ("token", "logp", "rank", "top_id", "top_logp", "top_p", "top_rank", "parent", "score", "sim")


class Flight(NamedTuple):
    """What a submitted plan computes, to be confirmed by its result."""

    step: int
    seqs: Ints  # whose KV it writes
    ends: Ints
    births: Longs
    eras: Longs
    read: Ints  # sequences of all segments
    read_births: Longs
    segments: list[Segment]
    scores: list[Part]  # entries of the last probe
    groups: list[Group]
    bounds: list[Ints | None]  # Probe.groups of each probe
    pipelined: bool  # every row's sequence can go on before the plan is applied


class Reading:
    """The reads of one Result.

    SAMPLE, and MERGE of one group, become lists once for all, since most groups have one or few sequences.
    `bounds`: Probe.groups of each.
    """

    def __init__(self, reads: list[Reads], bounds: list[Ints | None]) -> None:
        self._reads = reads
        self._bounds = bounds
        self.any_bad = any(bool(read.bad.any()) for read in reads)
        self._columns: dict[int, list[tuple[str, Any]]] = {}  # by probe: the fields that it has
        self._merged: dict[int, list[list[Any]]] = {}  # by probe: the columns of Merged
        self._samples: dict[int, tuple[list[int], list[float], list[int]]] = {}
        for index, read in enumerate(reads):
            if read.token is not None:
                assert read.logp is not None and read.rank is not None
                self._samples[index] = read.token.tolist(), read.logp.tolist(), read.rank.tolist()

    def bad(self, parts: list[Cut]) -> bool:
        """Whether any of the parts met NaN or nothing but -inf."""
        return any(bool(self._reads[part.probe].bad[part.begin : part.end].any()) for part in parts)

    def why(self, parts: list[Cut]) -> str | None:
        """What made an entry of the parts bad, where it was not the model."""
        return next(iter(why for part in parts if (why := first_why(self._reads[part.probe], part.begin, part.end))), None)

    def of(self, parts: list[Cut], keep: list[int] | None = None) -> list[Any]:
        """One item per part, Samples, Merged or Reads; `keep` are the positions of entries that still count."""
        found: list[Any] = []
        for part in parts:
            columns = self._samples.get(part.probe)
            if columns is None:
                found.append(self._merge(part) if part.merged else self._cut(part, keep))
            elif keep is None:
                found.append(Samples(part.begin, *columns))
            else:
                token, logp, rank = columns
                at = [part.begin + i for i in keep]
                found.append(Samples(0, [token[i] for i in at], [logp[i] for i in at], [rank[i] for i in at]))
        return found

    def _merge(self, part: Cut) -> Merged:
        columns = self._merged.get(part.probe)
        if columns is None:
            read, bounds = self._reads[part.probe], self._bounds[part.probe]
            assert read.parent is not None and bounds is not None
            parent = np.maximum(read.parent - bounds[:-1, None], -1)
            arrays: list[Any] = [parent, read.top_id, read.score, read.top_logp]
            ranks = [None] * len(parent) if read.top_rank is None else read.top_rank.tolist()
            columns = self._merged[part.probe] = [*(array.tolist() for array in arrays), ranks]
        parents, tokens, scores, logps, ranks = columns
        row = part.first
        return Merged(parents[row], tokens[row], scores[row], logps[row], ranks[row])

    def _cut(self, part: Cut, keep: list[int] | None) -> Reads:
        found = self._columns.get(part.probe)
        if found is None:
            read = self._reads[part.probe]
            found = [(name, column) for name in _FIELDS if (column := getattr(read, name)) is not None]
            self._columns[part.probe] = found
        rows, n = slice(part.first, part.last), part.n
        fields: dict[str, Any] = {
            name: column[rows] if column.ndim == 1 or column.shape[1] == n else column[rows, :n] for name, column in found
        }
        bad = self._reads[part.probe].bad[part.begin : part.end]
        if "parent" in fields:  # a search reads whole generations, so none of its sequences has gone meanwhile
            fields["parent"] = np.maximum(fields["parent"] - part.begin, -1)
        elif keep is not None:
            fields = {name: column[keep] for name, column in fields.items()}
            bad = bad[keep]
        return Reads(bad, **fields)


def first_why(reads: Reads, begin: int, end: int) -> str | None:
    """Why the first of entries [begin, end) that has a reason is bad."""
    return next((text for index, text in sorted(reads.why.items()) if begin <= index < end), None)


def generation(group: Group) -> tuple[Ids, list[Any], list[int]]:
    """What was read of a whole generation, which may have come in several steps: for whom, what, and their children.

    The group holds it no longer.
    """
    held, group.held = group.held, []
    if len(held) == 1:
        return held[0]
    counts = [len(seqs) for seqs, _, _ in held]
    reads = [join(parts, counts) for parts in zip(*(part for _, part, _ in held), strict=True)]
    return flat([seqs for seqs, _, _ in held]), reads, [child for _, _, forked in held for child in forked]


def join(parts: Sequence[Any], counts: list[int]) -> Any:
    """The reads of one Read that came in several steps, in order; counts are their entries."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Samples):
        at = [(part, i) for part, count in zip(parts, counts, strict=True) for i in range(part.begin, part.begin + count)]
        return Samples(0, [part.token[i] for part, i in at], [part.logp[i] for part, i in at], [part.rank[i] for part, i in at])
    begins = np.cumsum([0, *counts]).tolist()
    if isinstance(parts[0], Merged):
        whole = Merged([], [], [], [], None if any(part.rank is None for part in parts) else [])
        for part, begin in zip(parts, begins, strict=False):
            whole.parent += [-1 if parent < 0 else parent + begin for parent in part.parent]
            whole.token += part.token
            whole.score += part.score
            whole.logp += part.logp
            if whole.rank is not None:
                whole.rank += part.rank or ()
        return whole
    if parts[0].parent is not None:
        for part, begin in zip(parts, begins, strict=False):
            part.parent = np.where(part.parent < 0, -1, part.parent + begin)
    return joined(parts)


def joined(parts: Sequence[Reads]) -> Reads:
    """The entries of several Reads, one after another.

    A column that some lack is left out: a neighbour in the step of the others asked for it.
    """
    columns = {name: [getattr(part, name) for part in parts] for name in ("bad", *_FIELDS)}
    arrays: dict[str, Any] = {
        name: None if any(part is None for part in column) else np.concatenate(column) for name, column in columns.items()
    }
    begin, why = 0, {}
    for part in parts:
        why.update({begin + index: text for index, text in part.why.items()})
        begin += len(part.bad)
    return Reads(**arrays, why=why)

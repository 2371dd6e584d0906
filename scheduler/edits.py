"""Carrying out what a strategy decided: the five edits, on blocks, slots and tokens."""

from __future__ import annotations

import msgspec
import numpy as np

from .accounting import Trace, Usage
from .errors import PageforkError
from .group import Group, State, TokenTree, append_each
from .kv_manager import KVManager
from .plan import Ints, ints
from .scoring import Scored
from .slots import Slots
from .strategies.base import Ask, Drop, Edit, Emit, Finish, Grow, Ids, Read


class Update(msgspec.Struct):
    """What happened to a request in a step, in order; `scores` are of its prompt. `done`: it is over; `error`: why it failed.

    `usage` and `trace` come with the last one.
    """

    request_id: str
    events: list[Emit | Finish] = []
    asks: list[Ask] = []
    scores: list[Scored] = []
    done: bool = False
    cached_tokens: int = 0
    preemptions: int = 0
    usage: Usage | None = None
    trace: Trace | None = None
    error: PageforkError | None = None


class Editor:
    """Applies edits. Appends are collected over all groups and done at once by `flush`."""

    def __init__(self, kv: KVManager, slots: Slots) -> None:
        self._kv = kv
        self._slots = slots
        self.emitted = 0  # tokens, since the start
        self._appends: list[tuple[TokenTree, Ids, Ids]] = []

    def apply(self, group: Group, edits: list[Edit], update: Update, read: Ids = ()) -> None:
        """Carry out what a group's strategy decided after `read` was read.

        Forks share before anything is dropped; what is dropped, or was read and not grown, gives its slot before
        forks take any.
        """
        forks: list[tuple[Ints, Ints]] = []
        dropped: list[Ids] = []
        grown: list[Ids] = []
        for edit in edits:
            if isinstance(edit, Emit):
                self.emitted += len(edit.tokens)
                update.events.append(edit)
            elif isinstance(edit, Grow):
                self._grow(group, edit, forks)
                if edit.run:
                    grown.append(edit.dst)
            elif isinstance(edit, Drop):
                dropped.append(edit.seqs)
            elif isinstance(edit, Finish):
                update.events.append(edit)
                group.unfinished.discard(edit.index)
            else:
                group.asked = True
                update.asks.append(edit)
        if forks or dropped or len(grown) != 1 or len(grown[0]) != len(read):
            self._reslot(group, forks, _joined(dropped), np.setdiff1d(_joined([read]), _joined(grown + dropped)))

    def _grow(self, group: Group, edit: Grow, forks: list[tuple[Ints, Ints]]) -> None:
        if edit.dst is edit.src and group.strategy.pipelined:  # never parked, so no slot to see to
            self._appends.append((group.tokens, edit.src, edit.token))
            group.expect += len(edit.src)
            return
        src, dst, token = ints(edit.src), ints(edit.dst), ints(edit.token)
        table = self._kv.table
        fresh = src != dst
        if fresh.any():
            self._kv.fork(src[fresh], dst[fresh])
            table.stream[dst[fresh]] = (
                table.stream[src[fresh]] if edit.stream is None else np.asarray(edit.stream, np.int64)[fresh]
            )
        nodes = group.tokens.extend(table.node[src], token)
        table.known[dst] += 1
        table.last[dst] = token
        table.node[dst] = nodes
        table.run[dst] = edit.run
        if edit.text is not None:
            group.text.update(zip(dst.tolist(), edit.text, strict=True))
        if edit.run:
            group.expect += len(dst)
            idle = ~fresh & (table.slot[dst] < 0)
            forks.append((src[fresh | idle], dst[fresh | idle]))

    def flush(self) -> None:
        """Make the collected appends count."""
        if not self._appends:
            return
        table = self._kv.table
        seqs = ints([seq for _, part, _ in self._appends for seq in part])
        tokens = [token for _, _, part in self._appends for token in part]
        trees = [tree for tree, part, _ in self._appends for _ in part]
        table.known[seqs] += 1
        table.last[seqs] = tokens
        table.node[seqs] = append_each(trees, table.node[seqs].tolist(), tokens)
        self._appends = []

    def _reslot(self, group: Group, forks: list[tuple[Ints, Ints]], dropped: Ints, parked: Ints) -> None:
        table = self._kv.table
        # A source that gives up its slot keeps its number in the forks: a plan reads all sources before it writes.
        sources = [(table.slot[src].copy(), dst) for src, dst in forks]
        self._slots.close(parked)
        table.run[parked] = False
        if len(dropped):
            self._slots.close(dropped)
            for seq in dropped.tolist():
                group.text.pop(seq, None)
            self._kv.drop(dropped)
            group.live -= len(dropped)
        # A group that was preempted with a read in flight gets its slots when it is back.
        for slots, dst in sources if group.state is State.RUNNING else ():
            self._slots.fork(slots, dst.tolist())


def _joined(parts: list[Ids]) -> Ints:
    return np.concatenate([ints(), *map(ints, parts)])


def fork_now(kv: KVManager, slots: Slots, group: Group, read: Read) -> list[int]:
    """Fork the sequences of a Read that are new, inside the plan: several draws from one row. Who they are."""
    assert read.seqs is not None
    table = kv.table
    new = [i for i, seq in enumerate(read.seqs) if table.known[seq] == 0]
    if not new:
        return []
    src, dst = ints([read.at[i] for i in new]), ints([read.seqs[i] for i in new])
    kv.fork(src, dst)
    table.stream[dst] = table.stream[src] if read.stream is None else [read.stream[i] for i in new]
    children: list[int] = dst.tolist()
    slots.open(children)
    for source, child in zip(src.tolist(), children, strict=True):
        if source in group.text:
            group.text[child] = group.text[source]
    return children


def going_on(kv: KVManager) -> set[int]:
    """Numbers of the groups that have something to compute, or a read-out in flight."""
    table = kv.table
    busy = table.alive & table.run & ((table.known > table.scheduled) | (table.pending > 0))
    return set(table.group[busy].tolist())

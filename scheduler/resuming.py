"""Recomputing what a preempted group lost, each shared block once.

What all its sequences share becomes the trunk: one of them computes it for all. From there on running sequences wait for
the one that leads on their path, and take the full blocks that they share with it. What is parked is not computed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .group import Group
from .kv_manager import KVManager
from .plan import Bools, Ints, Longs
from .sequences import NO_CAP
from .slots import Slots


class _Waiting(NamedTuple):
    """Sequences that take `blocks` leading blocks from those that lead them, once these are computed."""

    seqs: Ints
    births: Longs
    leads: Ints
    blocks: Ints

    def where(self, keep: Bools) -> _Waiting:
        return _Waiting(self.seqs[keep], self.births[keep], self.leads[keep], self.blocks[keep])


class Resuming:
    """Groups of several sequences on their way back into the cache."""

    def __init__(self, kv: KVManager, slots: Slots) -> None:
        self._kv = kv
        self._slots = slots
        self._heads: dict[int, int] = {}  # by group number: the sequence that computes what all share
        self._waiting: dict[int, _Waiting] = {}

    def start(self, group: Group, shared: int) -> None:
        """A group rests on its trunk; `shared` tokens, whole blocks of them, are common to all its sequences."""
        table = self._kv.table
        seqs = table.of(group.number)
        if len(seqs) == 1 or len(group.trunk) * self._kv.block_size == shared:
            self._branch(group, seqs)
            return
        head = seqs[table.run[seqs]][:1]
        self._heads[group.number] = int(head[0])
        table.cap[seqs] = 0
        table.cap[head] = shared
        self._slots.open(head)

    def holds(self, group: Group) -> bool:
        """Whether sequences of the group wait for others."""
        return group.number in self._heads or group.number in self._waiting

    def forget(self, group: Group) -> None:
        """The group ended, or lost its blocks again."""
        self._heads.pop(group.number, None)
        self._waiting.pop(group.number, None)

    def follow(self, groups: dict[int, Group]) -> None:
        """Let sequences go on that waited for what was computed in the last step."""
        table = self._kv.table
        for number, head in list(self._heads.items()):
            if table.computed[head] >= table.cap[head]:
                del self._heads[number]
                seqs = table.of(number)
                groups[number].trunk.extend(table.tail[head, : table.cols[head]].tolist())
                self._kv.rest_on_trunk(groups[number], seqs)
                self._branch(groups[number], seqs)
        for number, waiting in list(self._waiting.items()):
            self._take(number, waiting)

    def _branch(self, group: Group, seqs: Ints) -> None:
        """All sequences rest on the trunk: those that run on a path of their own start, the others wait for these."""
        table = self._kv.table
        running = seqs[table.run[seqs]]
        leads, blocks = self._leads(group, running)
        waits = blocks > len(group.trunk)
        table.cap[seqs] = NO_CAP
        if waits.any():
            later = running[waits]
            table.cap[later] = 0
            self._waiting[group.number] = _Waiting(later, table.birth[later], running[leads[waits]], blocks[waits])
        first = running[~waits]
        self._slots.open(first[table.slot[first] < 0])
        self._slots.close(running[waits])

    def _leads(self, group: Group, seqs: Ints) -> tuple[Ints, Ints]:
        """For each of some sequences an earlier one that shares the most full blocks with it, and how many; 0 for none.

        The last known token of each is computed by itself, since something is read there.
        """
        table, size, prompt = self._kv.table, self._kv.block_size, len(group.request.prompt)
        leads, blocks = np.zeros((2, len(seqs)), np.int32)
        if len(seqs) < 2:
            return leads, blocks
        order = np.arange(len(seqs))
        alone = -2 - order  # nobody's node
        nodes = group.tokens.parents(table.node[seqs])
        generated = table.known[seqs] - 1 - prompt
        depth = generated.copy()
        for count in range(int(table.known[seqs].max() - 1) // size, len(group.trunk), -1):
            end = count * size - prompt
            while len(deeper := np.flatnonzero(depth > max(end, 0))):
                nodes[deeper] = group.tokens.parents(nodes[deeper])
                depth[deeper] -= 1
            there = np.where(generated >= end, nodes, alone)
            _, first, which = np.unique(there, return_index=True, return_inverse=True)
            found = (blocks == 0) & (first[which] < order)
            leads[found], blocks[found] = first[which][found], count
        return leads, blocks

    def _take(self, number: int, waiting: _Waiting) -> None:
        """Give those their blocks whose leads have computed them."""
        table, size = self._kv.table, self._kv.block_size
        ready = table.computed[waiting.leads] >= waiting.blocks * size
        if not ready.any():
            return
        if ready.all():
            del self._waiting[number]
        else:
            self._waiting[number] = waiting.where(~ready)
        seqs, _, leads, blocks = waiting.where(ready & (table.birth[waiting.seqs] == waiting.births))
        self._kv.share(seqs, leads, blocks)
        table.cap[seqs] = NO_CAP
        self._slots.open(seqs)

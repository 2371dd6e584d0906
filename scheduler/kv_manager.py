"""Which blocks each sequence holds: writing, sharing, copying on write, publishing, giving back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .block_pool import BlockPool
from .group import Group
from .plan import Bools, Ints, ints
from .prefix_cache import PrefixCache
from .sequences import NO_CAP, Sequences, within

WIDE = 64  # a group with more sequences publishes only what all of them hold


class Needs(NamedTuple):
    """Blocks that rows need before they can be written; arrays by row."""

    new: Ints  # blocks to append
    copy: Bools  # whether the block of the first position is shared or published, so that it must be copied
    column: Ints  # tail column of the first position
    block: Ints  # block there now

    @property
    def total(self) -> int:
        return int(self.new.sum()) + int(np.count_nonzero(self.copy))


class Written(NamedTuple):
    """What `write` did: block copies and changed table entries."""

    src: Ints
    dst: Ints
    seq: Ints
    column: Ints
    block: Ints


class KVManager:
    """The block pool, the prefix cache and the block tables of all sequences.

    A block is writable at an offset when it is unpublished and either held once or filled just up to that
    offset: the first of several forks appends in place, the others copy.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.prefix = PrefixCache(self.pool, block_size)
        self.caching = enable_prefix_caching
        self.table = Sequences()
        self.forks = 0  # sequences that began as copies, since the start
        self.replaced = False  # whether table entries were replaced since the last plan
        self._owner: Ints = np.zeros(num_blocks, np.int32)  # scratch of drop()

    def needs(self, seqs: Ints, start: Ints, end: Ints) -> Needs:
        """What rows [start, end) of the sequences need, all in one step."""
        table, pool, size = self.table, self.pool, self.block_size
        trunk, cols = table.trunk[seqs], table.cols[seqs]
        column = start // size - trunk
        new = (end - 1) // size - trunk + 1 - cols
        partial = column < cols
        block = np.where(partial, table.tail[seqs, np.minimum(column, table.tail.shape[1] - 1)], 0)
        copy = partial & ((pool.uid[block] != 0) | (pool.refs[block] > 1))
        if copy.any():
            in_place = np.flatnonzero(copy & (pool.uid[block] == 0) & (pool.filled[block] == start % size))
            copy[in_place[np.unique(block[in_place], return_index=True)[1]]] = False
        return Needs(new, copy, column, block)

    def write(self, seqs: Ints, start: Ints, end: Ints, needs: Needs) -> Written:
        """Give the rows their blocks. The copied blocks keep their references until `settle`."""
        table, pool, size = self.table, self.pool, self.block_size
        blocks = pool.allocate(needs.total)
        copied = np.flatnonzero(needs.copy)
        dst, blocks = blocks[: len(copied)], blocks[len(copied) :]
        table.tail[seqs[copied], needs.column[copied]] = dst

        rows = np.repeat(np.arange(len(seqs)), needs.new)
        column = table.cols[seqs][rows] + within(needs.new)
        table.reserve_columns(int(column.max(initial=-1)) + 1)
        table.tail[seqs[rows], column] = blocks
        table.cols[seqs] += needs.new
        table.scheduled[seqs] = end

        pool.filled[blocks] = size
        last = (end - 1) // size
        pool.filled[table.tail[seqs, last - table.trunk[seqs]]] = end - last * size
        longer = np.flatnonzero(start // size < last)
        pool.filled[table.tail[seqs[longer], needs.column[longer]]] = size
        return Written(
            needs.block[copied],
            dst,
            np.concatenate([seqs[copied], seqs[rows]]),
            np.concatenate([needs.column[copied], column]) + table.trunk[np.concatenate([seqs[copied], seqs[rows]])],
            np.concatenate([dst, blocks]),
        )

    def settle(self, written: Written) -> None:
        """Once the plan is sealed: sources of copies are let go, so none of them was a destination in it."""
        self.pool.release(written.src)

    def take_prefix(self, group: Group, tokens: Ints, max_blocks: int) -> int:
        """Hold the cached blocks of a prompt as the group's trunk; how many there were."""
        if not self.caching or max_blocks <= 0:
            return 0
        root = self.prefix.root(group.request.salt)
        blocks = self.prefix.take(root, tokens, max_blocks)
        group.trunk = blocks.tolist()
        return len(blocks)

    def drop_prefix(self, group: Group) -> None:
        """Undo take_prefix."""
        self.pool.release(np.array(group.trunk, np.int32))
        group.trunk = []

    def rest_on_trunk(self, group: Group, seqs: Ints | int) -> None:
        """These sequences hold nothing but the trunk, and are computed just that far."""
        table, blocks = self.table, len(group.trunk)
        table.trunk[seqs] = table.published[seqs] = blocks
        table.scheduled[seqs] = table.computed[seqs] = blocks * self.block_size
        table.cols[seqs] = 0

    def evict(self, group: Group, seqs: Ints) -> None:
        """Take the sequences' own blocks; they live on and are recomputed from the trunk when needed."""
        group.usage.blocks_freed += len(self.pool.release(self.table.blocks(seqs)))
        self.table.era[seqs] += 1
        self.rest_on_trunk(group, seqs)

    def evict_all(self, group: Group) -> None:
        """Take every block of the group."""
        seqs = self.table.of(group.number)
        group.usage.blocks_freed += len(self.pool.release(np.concatenate([ints(group.trunk), self.table.blocks(seqs)])))
        group.trunk = []
        self.table.era[seqs] += 1
        self.rest_on_trunk(group, seqs)

    def fork(self, src: Ints, dst: Ints) -> None:
        """dst share all blocks of src."""
        self.table.fork(src, dst)
        self.pool.retain(self.table.blocks(dst))
        self.forks += len(dst)

    def share(self, seqs: Ints, leads: Ints, blocks: Ints) -> None:
        """Sequences that rest on the trunk take so many leading blocks of others of their group, which are computed."""
        table = self.table
        cols = blocks - table.trunk[seqs]
        width = int(cols.max(initial=0))
        table.tail[seqs, :width] = table.tail[leads, :width]
        table.cols[seqs] = cols
        table.scheduled[seqs] = table.computed[seqs] = blocks * self.block_size
        table.published[seqs] = np.minimum(table.published[leads], blocks)
        self.pool.retain(table.blocks(seqs))

    def take_replaced(self, groups: dict[int, Group]) -> tuple[Ints, Ints, Ints]:
        """Sequences, columns and blocks of table entries that were replaced since the last call, and of those after them.

        Only of sequences that have a slot: the others' tables are sent whole when they get one.
        """
        table = self.table
        self.replaced = False
        seqs = ints(np.flatnonzero((table.outdated < NO_CAP) & (table.slot >= 0)))
        first = np.minimum(table.outdated[seqs], table.trunk[seqs] + table.cols[seqs])
        table.outdated[:] = NO_CAP
        parts = [self.held(groups[int(table.group[seq])], seq)[begin:] for seq, begin in zip(seqs, first.tolist(), strict=True)]
        counts = ints([len(part) for part in parts])
        return np.repeat(seqs, counts), np.repeat(first, counts) + within(counts), np.concatenate([ints(), *parts])

    def held(self, group: Group, seq: int) -> Ints:
        """The block table of a sequence."""
        return np.concatenate([ints(group.trunk), self.table.tail[seq, : self.table.cols[seq]]])

    def drop(self, seqs: Ints) -> Ints:
        """The sequences end; for each block that nobody holds after that, the number of the group that held it."""
        table = self.table
        blocks = table.blocks(seqs)
        self._owner[blocks] = np.repeat(table.group[seqs], table.cols[seqs])
        freed = self.pool.release(blocks)
        table.free(seqs)
        return self._owner[freed]

    def publish(self, group: Group, seqs: list[int]) -> None:
        """Make the full computed blocks of sequences findable; where equal ones are, hold those instead.

        Where a group is wide, only those that all its sequences hold: few of the others are ever asked for.
        """
        table, size = self.table, self.block_size
        if group.live > WIDE:
            table.published[seqs] = table.computed[seqs] // size
            everyone = table.of(group.number)
            begin = len(group.trunk)
            self._promote(group, everyone, self._in_common(everyone))
            self._publish(group, everyone, begin, len(group.trunk))
            return
        for seq in seqs:
            begin, full = int(table.published[seq]), int(table.computed[seq]) // size
            self._publish(group, ints([seq]), begin, full)
            table.published[seq] = full
        everyone = table.of(group.number) if group.live > 1 else ints(seqs)
        shared = int(table.published[seqs[-1]]) - len(group.trunk)
        self._promote(group, everyone, min(shared, self._in_common(everyone)) if group.live > 1 else shared)

    def _publish(self, group: Group, seqs: Ints, begin: int, end: int) -> None:
        """Publish blocks [begin, end) of sequences that share them, as long as the chain up to them is in the cache."""
        if not self.caching or begin >= end:
            return
        pool, size, trunk, first = self.pool, self.block_size, group.trunk, int(seqs[0])
        row, head = self.table.tail[first], len(trunk)
        before = 0 if begin == 0 else trunk[begin - 1] if begin <= head else int(row[begin - 1 - head])
        for index in range(begin, end):
            block = trunk[index] if index < head else int(row[index - head])
            parent = int(pool.uid[before]) if index else self.prefix.root(group.request.salt)
            if parent and not pool.uid[block]:  # without a parent the chain was taken out of the cache
                found = self.prefix.publish(parent, group.token_bytes(first, index * size, (index + 1) * size), block)
                if found != block:
                    self._replace(group, seqs, index, found)
                    block = found
            before = block

    def _replace(self, group: Group, seqs: Ints, index: int, block: int) -> None:
        """Sequences that share block `index` hold another one with the same content from now on."""
        table, trunk = self.table, group.trunk
        if index < len(trunk):
            old, trunk[index] = ints([trunk[index]]), block
        else:
            old = table.tail[seqs, index - len(trunk)]
            table.tail[seqs, index - len(trunk)] = block
        self.pool.retain(np.full(len(old), block, np.int32))
        self.pool.release(old)
        table.outdated[seqs] = np.minimum(table.outdated[seqs], index)
        self.replaced = True

    def _promote(self, group: Group, seqs: Ints, shared: int) -> None:
        """`shared` leading tail blocks that all sequences hold become trunk: one reference for all, shorter tails to fork."""
        if shared <= 0:
            return
        table = self.table
        blocks = table.tail[int(seqs[0]), :shared].copy()
        group.trunk.extend(blocks.tolist())
        if len(seqs) > 1:
            self.pool.release(np.repeat(blocks, len(seqs) - 1))
        who: Ints | int = seqs if len(seqs) > 1 else int(seqs[0])  # arrays of one are slow
        table.tail[who, :-shared] = table.tail[who, shared:]
        table.cols[who] -= shared
        table.trunk[who] += shared
        table.published[who] = np.maximum(table.published[who], len(group.trunk))

    def _in_common(self, seqs: Ints) -> int:
        """How many leading tail blocks are full in all of the sequences, and the same."""
        table = self.table
        full = int(np.minimum(table.computed[seqs] // self.block_size - table.trunk[seqs], table.cols[seqs]).min())
        if full <= 0:
            return 0
        tails = table.tail[seqs, :full]
        same = (tails == tails[0]).all(axis=0)
        return full if same.all() else int(np.argmin(same))

    @property
    def shared_ratio(self) -> float:
        """Of the blocks that all sequences would hold if none shared, the part that is not needed."""
        table = self.table
        entries = int((table.trunk + table.cols)[table.alive].sum())
        return 1.0 - int(np.count_nonzero(self.pool.refs[1:])) / entries if entries else 0.0

    def group_ratio(self, group: Group) -> float:
        """The same of one group."""
        table = self.table
        seqs = table.of(group.number)
        blocks = table.blocks(seqs)
        entries = len(group.trunk) * len(seqs) + len(blocks)
        return 1.0 - (len(group.trunk) + len(np.unique(blocks))) / entries if entries else 0.0

    def unpublish(self, group: Group) -> None:
        """Take every block of the group out of the prefix cache: its content can't be trusted."""
        seqs = self.table.of(group.number)
        for block in {*group.trunk, *self.table.blocks(seqs).tolist()}:
            self.pool.unpublish(block)

    def check(self, groups: list[Group]) -> None:
        """Raise BlockAccountingError unless every reference count equals the references of the tables."""
        alive = np.flatnonzero(self.table.alive).astype(np.int32)
        trunks = [np.array(group.trunk, np.int32) for group in groups]
        self.pool.check(np.concatenate([self.table.blocks(alive), *trunks]))

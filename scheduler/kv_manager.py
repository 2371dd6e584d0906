"""Which blocks each sequence holds: writing, sharing, copying on write, publishing, giving back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .block_pool import BlockPool
from .group import Group
from .plan import Bools, Ints, ints
from .prefix_cache import PrefixCache
from .sequences import Sequences


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
        # (seq, birth, column, block): entries replaced by an equal published block, to be told with the next plan
        self.replaced: list[tuple[int, int, int, int]] = []

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
        nth = np.arange(len(rows)) - np.repeat(np.cumsum(needs.new) - needs.new, needs.new)
        column = table.cols[seqs][rows] + nth
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
        self.pool.release(self.table.blocks(seqs))
        self.table.era[seqs] += 1
        self.rest_on_trunk(group, seqs)

    def evict_all(self, group: Group) -> None:
        """Take every block of the group."""
        seqs = self.table.of(group.number)
        self.pool.release(self.table.blocks(seqs))
        self.pool.release(np.array(group.trunk, np.int32))
        group.trunk = []
        self.table.era[seqs] += 1
        self.rest_on_trunk(group, seqs)

    def fork(self, src: Ints, dst: Ints) -> None:
        """dst share all blocks of src."""
        self.table.fork(src, dst)
        self.pool.retain(self.table.blocks(dst))
        if self.replaced:
            births = self.table.birth
            by_birth: dict[int, list[tuple[int, int]]] = {}
            for _, birth, column, block in self.replaced:
                by_birth.setdefault(birth, []).append((column, block))
            for source, child in zip(src.tolist(), dst.tolist(), strict=True):
                entries = by_birth.get(int(births[source]), ())
                self.replaced += [(child, int(births[child]), column, block) for column, block in entries]

    def take_replaced(self) -> tuple[Ints, Ints, Ints]:
        """Sequences, columns and blocks of replaced table entries since the last call, of those that have a slot."""
        table = self.table
        rows = [
            (seq, column, block)
            for seq, birth, column, block in self.replaced
            if table.birth[seq] == birth and table.slot[seq] >= 0
        ]
        self.replaced = []
        seqs, columns, blocks = ints(rows).reshape(-1, 3).T
        return seqs, columns, blocks

    def drop(self, seqs: Ints) -> None:
        """The sequences end."""
        self.pool.release(self.table.blocks(seqs))
        self.table.cols[seqs] = 0
        self.table.free(seqs)

    def publish(self, group: Group, seq: int) -> None:
        """Make the full computed blocks of a sequence findable; where equal ones are, hold those instead."""
        table, size = self.table, self.block_size
        begin, full, trunk = int(table.published[seq]), int(table.computed[seq]) // size, len(group.trunk)
        if self.caching:
            row = table.tail[seq]
            before = 0 if begin == 0 else group.trunk[begin - 1] if begin <= trunk else int(row[begin - 1 - trunk])
            for index in range(begin, full):
                block = int(row[index - trunk])
                before = self._publish(group, seq, index, before, block)
                if before != block:
                    row[index - trunk] = before
        table.published[seq] = full
        self._promote(group, seq)

    def _publish(self, group: Group, seq: int, index: int, before: int, block: int) -> int:
        """Publish block `index` of a sequence, which follows block `before`; the block to hold from now on."""
        pool, size = self.pool, self.block_size
        if pool.uid[block]:
            return block
        parent = int(pool.uid[before]) if index else self.prefix.root(group.request.salt)
        if not parent:  # the chain was taken out of the cache
            return block
        found = self.prefix.publish(parent, group.token_bytes(seq, index * size, (index + 1) * size), block)
        if found != block:
            pool.retain(ints([found]))
            pool.release(ints([block]))
            self.replaced.append((seq, int(self.table.birth[seq]), index, found))
        return found

    def _promote(self, group: Group, seq: int) -> None:
        """Leading full blocks that all sequences hold become trunk: one reference for all, shorter tails to fork."""
        table = self.table
        seqs: Ints | int = seq
        shared = int(table.published[seq]) - len(group.trunk)
        if group.live > 1:
            seqs = table.of(group.number)
            shared = min(shared, self._in_common(seqs))
        if shared <= 0:
            return
        blocks = table.tail[seq, :shared].copy()
        group.trunk.extend(blocks.tolist())
        if group.live > 1:
            self.pool.release(np.repeat(blocks, group.live - 1))
        table.tail[seqs, :-shared] = table.tail[seqs, shared:]
        table.cols[seqs] -= shared
        table.trunk[seqs] += shared
        table.published[seqs] = np.maximum(table.published[seqs], len(group.trunk))

    def _in_common(self, seqs: Ints) -> int:
        """How many leading tail blocks are full in all of the sequences, and the same."""
        table = self.table
        full = int(np.minimum(table.computed[seqs] // self.block_size - table.trunk[seqs], table.cols[seqs]).min())
        if full <= 0:
            return 0
        tails = table.tail[seqs, :full]
        same = (tails == tails[0]).all(axis=0)
        return full if same.all() else int(np.argmin(same))

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

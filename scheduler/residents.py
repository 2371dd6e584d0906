"""Which groups are in the cache: starting them, choosing their rows, making room, giving their place to others."""

from __future__ import annotations

import itertools

import numpy as np

from .errors import BlockAccountingError
from .group import Group, State
from .kv_manager import KVManager, Needs
from .plan import ints
from .planning import Chosen
from .policy import WaitingQueue
from .reading import Flight
from .resuming import Resuming
from .sequences import edges
from .slots import Slots


class Residents:
    """Groups that wait, and groups that run: the latter hold slots and blocks.

    `max_num_seqs` slots; `budget` tokens are computed in a step, of which a floor is kept for prompts, so that
    one row for every running sequence always fits.
    """

    def __init__(self, kv: KVManager, max_num_seqs: int, budget: int) -> None:
        self.kv = kv
        self.slots = Slots(max_num_seqs, kv.table)
        self.waiting = WaitingQueue()
        self.running: dict[int, Group] = {}
        self.exhausted: list[Group] = []  # removed because even the whole cache was too small
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        prefill_floor = min(kv.block_size, max(1, budget // 4))
        self.max_width = min(max_num_seqs, budget - prefill_floor)
        self._max_num_seqs = max_num_seqs
        self._budget = budget
        self._watermark = kv.pool.num_blocks // 100
        self._widths = 0
        self._resuming = Resuming(kv, self.slots)

    def choose(self) -> tuple[Chosen, Needs]:
        """The rows of the next step and the blocks they need, which are free."""
        before = self.preemptions
        chosen, needs = self._fit()
        if self.preemptions == before and self._admit(chosen, needs):
            chosen, needs = self._fit()
        return chosen, needs

    def _runnable(self) -> Chosen:
        """Rows of running sequences within the token budget: one-token rows by group, then chunks in order."""
        table = self.kv.table
        target = np.minimum(table.known + table.pending, table.cap)
        ready = table.run & (table.slot >= 0) & (table.scheduled < target)
        ready &= (table.pending == 0) | (table.pipelined & (table.known + table.pending < table.limit))
        seqs = np.flatnonzero(ready).astype(np.int32)
        start, end = table.scheduled[seqs], target[seqs]
        single = end - start == 1
        short, long = np.flatnonzero(single), np.flatnonzero(~single)
        short = short[np.argsort(table.group[seqs[short]], kind="stable")]
        budget = self._budget - len(short)
        if len(long):
            orders = [self.running[int(number)].order for number in table.group[seqs[long]]]
            long = long[sorted(range(len(long)), key=orders.__getitem__)]
            take = np.minimum(
                end[long] - start[long], np.maximum(0, budget - np.cumsum(end[long] - start[long]) + end[long] - start[long])
            )
            end[long] = start[long] + take
            long = long[take > 0]
        return Chosen(seqs, start, end).where(np.concatenate([short, long]))

    def _fit(self) -> tuple[Chosen, Needs]:
        """Make room for the rows: shed parked blocks, then preempt the youngest groups, until the rest fits."""
        while True:
            chosen = self._runnable()
            needs = self.kv.needs(*chosen)
            if needs.total <= self.kv.pool.free:
                return chosen, needs
            youngest = max(self.running.values(), key=lambda group: group.order)
            if not self._shed(needs.total):
                if len(self.running) == 1:
                    self.remove(youngest)
                    self.exhausted.append(youngest)
                else:
                    self._preempt(youngest)

    def _shed(self, wanted: int) -> bool:
        """Evict parked sequences, youngest group first, until `wanted` blocks are free; whether any went."""
        before = self.kv.pool.free
        for group in sorted(self.running.values(), key=lambda group: group.order, reverse=True):
            parked = ints(group.strategy.shed(group))
            for seq in parked[self.kv.table.cols[parked] > 0].tolist():
                if self.kv.pool.free >= wanted:
                    return True
                self.kv.evict(group, ints([seq]))
        return self.kv.pool.free > before

    def _shed_for(self, wanted: int) -> bool:
        """Evict parked sequences for a waiting group, if that can give it room; whether it did."""
        table, free = self.kv.table, self.kv.pool.free
        parked = table.alive & ~table.run & (table.cols > 0)
        return free + int(table.cols[parked].sum()) >= wanted and self._shed(wanted) and self.kv.pool.free >= wanted

    def _preempt(self, group: Group) -> None:
        """Give all blocks and slots of a group back; it waits at its old place and is recomputed from its tokens."""
        table = self.kv.table
        seqs = table.of(group.number)
        held = len(group.trunk) + len(np.unique(table.blocks(seqs[table.run[seqs]])))
        group.needed = max(held, group.needed if self._resuming.holds(group) else 0)
        self.kv.evict_all(group)
        self.slots.close(seqs)
        table.cap[seqs] = 0
        self._resuming.forget(group)
        group.state = State.WAITING
        group.common = None
        group.preemptions += 1
        self.preemptions += 1
        del self.running[group.number]
        self._widths -= group.width
        self.waiting.push(group)

    def _admit(self, chosen: Chosen, needs: Needs) -> bool:
        """Start waiting groups with what the running ones leave of tokens, slots and blocks; whether any did."""
        budget = self._budget - int((chosen.end - chosen.start).sum())
        if not len(self.waiting) or budget <= 0:
            return False
        table, size = self.kv.table, self.kv.block_size
        # Running prompts will need blocks for the rest of their tokens too.
        running = np.flatnonzero(table.run & (table.slot >= 0) & (table.known > table.scheduled))
        rest = -(-table.known[running] // size) - table.trunk[running] - table.cols[running]
        reserved = max(needs.total, int(rest.clip(0).sum())) + self._watermark

        def fits(group: Group) -> bool | None:
            nonlocal budget, reserved
            if group.flights or (group.live and not table.run[table.of(group.number)].any()):
                return None  # reads or values that it waits for are still out
            if budget <= 0 or self._widths + group.width > self.max_width:
                return False
            tokens, shared = self._lengths(group)
            reusable = shared if group.is_scored else min(shared, group.scored)
            hits = self.kv.take_prefix(group, group.prefix(shared), reusable // size)
            room = max(-(-tokens // size), group.needed) - hits + group.width
            if self.running and self.kv.pool.free < reserved + room and not self._shed_for(reserved + room):
                self.kv.drop_prefix(group)
                return False
            reserved += room
            budget -= tokens - hits * size
            self._start(group, tokens, shared)
            return True

        return bool(self.waiting.admit(fits))

    def _lengths(self, group: Group) -> tuple[int, int]:
        """Tokens of the longest sequence that runs, and how many whole blocks of tokens all sequences can share."""
        longest = shortest = common = len(group.request.prompt)
        if group.live:
            table = self.kv.table
            seqs = table.of(group.number)
            running = table.known[seqs[table.run[seqs]]]
            longest, shortest = int(running.max()), int(running.min())  # what is parked is not read again: it may be whole
            if group.common is None:
                group.common = group.common_length(seqs)
            common = group.common
        return longest, min(common, shortest - 1) // self.kv.block_size * self.kv.block_size

    def _start(self, group: Group, tokens: int, shared: int) -> None:
        """Give a group its slots. Several sequences that come back do so by and by."""
        table = self.kv.table
        hit = len(group.trunk) * self.kv.block_size
        self.prefix_queries += tokens
        self.prefix_hits += hit
        group.state = State.RUNNING
        group.common = None
        self.running[group.number] = group
        self._widths += group.width
        if not group.live:
            group.cached_tokens = hit
            root = group.root()
            self.kv.rest_on_trunk(group, root)
            self.slots.open(ints([root]))
            return
        seqs = table.of(group.number)
        self.kv.rest_on_trunk(group, seqs)
        self._resuming.start(group, shared)

    def confirm(self, flight: Flight, groups: dict[int, Group]) -> None:
        """What a plan computed counts from now on, for sequences that still hold the blocks it wrote."""
        for group in flight.groups:
            group.flights -= 1
        table = self.kv.table
        held = (table.birth[flight.seqs] == flight.births) & (table.era[flight.seqs] == flight.eras)
        seqs = flight.seqs[held]
        table.computed[seqs] = flight.ends[held]
        filled = seqs[table.computed[seqs] // self.kv.block_size > table.published[seqs]]
        owners = table.group[filled]
        for begin, end in itertools.pairwise(edges(owners)):
            self.kv.publish(groups[int(owners[begin])], filled[begin:end].tolist())
        self._resuming.follow(self.running)

    def remove(self, group: Group) -> None:
        """Give back everything a group holds; it is over."""
        state, group.state = group.state, State.ENDED
        if state is State.RUNNING:
            del self.running[group.number]
            self._widths -= group.width
        else:
            self.waiting.discard()
        self._resuming.forget(group)
        seqs = self.kv.table.of(group.number)
        self.slots.close(seqs)
        self.kv.drop_prefix(group)
        self.kv.drop(seqs)
        group.live = 0

    def check(self) -> None:
        """Raise BlockAccountingError when references, free blocks or slots contradict the live sequences."""
        self.kv.check(list(self.running.values()))
        table = self.kv.table
        slots = table.slot[table.alive & (table.slot >= 0)]
        if len(np.unique(slots)) != len(slots) or len(slots) + self.slots.free != self._max_num_seqs:
            raise BlockAccountingError(f"{len(slots)} slots in use and {self.slots.free} free, of {self._max_num_seqs}")
        if self._widths != sum(group.width for group in self.running.values()):
            raise BlockAccountingError(f"widths of running groups add up differently from {self._widths}")

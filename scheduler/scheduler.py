"""Continuous batching: which sequences compute which tokens in the next step, and what follows from the reads.

Every step computes, for as many sequences as fit, the tokens between what is scheduled and what is known.
One-token rows go first and always fit (admission sees to that); longer ones (prompts, resumed sequences)
share the rest of the token budget in order, in chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .edits import Editor, Update, fork_now, hopeless
from .errors import BlockAccountingError, EngineMisuseError, InvalidRequestError, KVExhaustedError, NumericError, PageforkError, StepFailedError
from .group import Group, State
from .kv_manager import KVManager, Needs
from .plan import Ints, Longs, Plan, Result, Rows, ints
from .planning import Chosen, Entries, ProbeTable, Segment, assemble, shared_runs, tokens_of
from .policy import WaitingQueue
from .reading import Reading, join
from .request import Request
from .sequences import NO_CAP
from .slots import Slots
from .strategies.base import Edit, Emit, Finish, Ids, make

_NARROW = 64  # up to this width a group's sequences are given as a list: arrays of few elements are slow


@dataclass(slots=True)
class Counters:
    """Totals since the start. Tokens, except where named otherwise."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    forward_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    forks: int = 0
    blocks_copied: int = 0


class _Flight(NamedTuple):
    """What a submitted plan computes, to be confirmed by its result."""

    step: int
    seqs: Ints  # whose KV it writes
    ends: Ints
    births: Longs
    eras: Longs
    read: Ints  # sequences of all segments
    read_births: Longs
    segments: list[Segment]
    groups: list[Group]


@dataclass
class Scheduler:
    """Plans steps over `num_blocks` cache blocks. `lag` plans may be out before their results are applied.

    max_num_seqs: slots. max_num_batched_tokens: tokens of one step, of which `prefill_floor` are kept for
    prompts: running sequences never take them.
    """

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    lag: int = 0
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.kv = KVManager(self.num_blocks, self.block_size, self.enable_prefix_caching)
        self.slots = Slots(self.max_num_seqs, self.kv.table)
        self.waiting = WaitingQueue()
        self._editor = Editor(self.kv, self.slots)
        self._groups: dict[int, Group] = {}
        self._by_id: dict[str, Group] = {}
        self._running: dict[int, Group] = {}
        self._flights: deque[_Flight] = deque()
        self._arrivals = 0
        self._widths = 0
        self._leads: dict[int, int] = {}  # resuming group: the sequence that computes its common prefix
        self._preempted = False
        self._ended: list[Update] = []
        self._broken: list[tuple[Group, Exception]] = []
        prefill_floor = min(self.block_size, max(1, self.max_num_batched_tokens // 4))
        self._max_width = min(self.max_num_seqs, self.max_num_batched_tokens - prefill_floor)
        self._watermark = self.num_blocks // 100

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError when it could never run."""
        if request.id in self._by_id:
            raise InvalidRequestError(f"request id {request.id!r} is in use by a request that has not finished")
        group = Group(self._arrivals, request, make(request), self.kv.table)
        if group.width > self._max_width:
            setting = "max_num_seqs" if self.max_num_seqs == self._max_width else "max_num_batched_tokens"
            raise InvalidRequestError(
                f"{group.width} sequences at once were asked for; {setting} allows {self._max_width}: lower n, best_of or the width, or raise it"
            )
        blocks = -(-len(request.prompt) // self.block_size) + group.width
        if blocks > self.num_blocks - 1:
            raise InvalidRequestError(
                f"a prompt of {len(request.prompt)} tokens and {group.width} sequences need {blocks} cache blocks of {self.block_size} tokens; "
                f"the cache has {self.num_blocks - 1}: raise num_blocks or kv_cache_memory, or shorten the prompt"
            )
        request.arrival = self._arrivals
        group.order = (request.priority if self.policy == "priority" else 0, request.arrival)
        self._arrivals += 1
        self._groups[group.number] = self._by_id[request.id] = group
        self.waiting.push(group)
        self.counters.prompt_tokens += len(request.prompt)

    def abort(self, request_id: str) -> Update | None:
        """End a request at whatever phase it is; None when there is none of that id."""
        group = self._by_id.get(request_id)
        return None if group is None else self._end(group, Update(request_id), "abort")

    def answer(self, request_id: str, values: list[float]) -> Update:
        """Values for the Ask of a request."""
        group = self._by_id[request_id]
        update = Update(request_id)
        group.asked = False
        self._edit(group, lambda: group.strategy.answer(group, values), update)
        self._editor.flush()
        return self._close([(group, update)])[0]

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def in_flight(self) -> int:
        """Plans whose results have not been applied."""
        return len(self._flights)

    # Planning

    def schedule(self) -> Plan | None:
        """The next step, or None when nothing can be computed now. Ended requests come with the next apply()."""
        if len(self._flights) > self.lag:
            raise EngineMisuseError(f"{len(self._flights)} plans are out, the scheduler was made for {self.lag} besides the current one")
        chosen, needs = self._fit(self._runnable())
        if self._admit(chosen, needs):
            chosen, needs = self._fit(self._runnable())
        if len(chosen.seqs) == 0:
            return None
        written = self.kv.write(*chosen, needs)
        offset, tokens = tokens_of(chosen, self.kv, self._groups)
        table = self.kv.table
        table.row[chosen.seqs] = np.arange(len(chosen.seqs))
        rows = Rows(table.slot[chosen.seqs], chosen.start, offset, tokens, shared_runs(chosen, self.kv))
        probes = ProbeTable()
        segments, children = self._probe(chosen, probes)
        plan = assemble(self.counters.steps, written, probes, self.kv, self.slots, self._groups, rows)
        self.kv.settle(written)
        self._launch(plan, chosen, segments, children)
        return plan

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
        budget = self.max_num_batched_tokens - len(short)
        if len(long):
            orders = [self._groups[int(number)].order for number in table.group[seqs[long]]]
            long = long[sorted(range(len(long)), key=orders.__getitem__)]
            take = np.minimum(end[long] - start[long], np.maximum(0, budget - np.cumsum(end[long] - start[long]) + end[long] - start[long]))
            end[long] = start[long] + take
            long = long[take > 0]
        return Chosen(seqs, start, end).where(np.concatenate([short, long]))

    def _fit(self, chosen: Chosen) -> tuple[Chosen, Needs]:
        """Make room for the rows: shed parked blocks, then preempt the youngest groups, until the rest fits."""
        while True:
            needs = self.kv.needs(*chosen)
            if needs.total <= self.kv.pool.free:
                return chosen, needs
            youngest = max(self._running.values(), key=lambda group: group.order)
            if not self._shed(needs.total):
                if len(self._running) == 1:
                    self._exhausted(youngest)
                else:
                    self._preempt(youngest)
            chosen = self._runnable()

    def _shed(self, wanted: int) -> bool:
        """Evict parked sequences, youngest group first, until `wanted` blocks are free; whether any went."""
        before = self.kv.pool.free
        for group in sorted(self._running.values(), key=lambda group: group.order, reverse=True):
            for seq in group.strategy.shed(group):
                if self.kv.pool.free >= wanted:
                    return True
                self.kv.evict(group, ints([seq]))
        return self.kv.pool.free > before

    def _exhausted(self, group: Group) -> None:
        have, size = self.num_blocks - 1, self.block_size
        error = KVExhaustedError(
            f"request {group.request.id!r} filled the whole cache ({have} blocks of {size} tokens) and could not go on: "
            "raise num_blocks or kv_cache_memory, or lower n, best_of, the width or max_tokens"
        )
        self._ended.append(self._end(group, Update(group.request.id, error=error), "error"))

    def _preempt(self, group: Group) -> None:
        """Give all blocks and slots of a group back; it waits at its old place and is recomputed from its tokens."""
        seqs = self.kv.table.of(group.number)
        self.kv.evict_all(group)
        self.slots.close(seqs)
        self.kv.table.cap[seqs] = 0
        self._leads.pop(group.number, None)
        group.state = State.WAITING
        group.preemptions += 1
        self.counters.preemptions += 1
        del self._running[group.number]
        self._widths -= group.width
        self.waiting.push(group)
        self._preempted = True

    # Admission

    def _admit(self, chosen: Chosen, needs: Needs) -> bool:
        """Start waiting groups with what the running ones leave of tokens, slots and blocks; whether any did."""
        preempted, self._preempted = self._preempted, False
        budget = self.max_num_batched_tokens - int((chosen.end - chosen.start).sum())
        if preempted or not len(self.waiting) or budget <= 0:
            return False
        table, size = self.kv.table, self.block_size
        # Running prompts will need blocks for the rest of their tokens too.
        running = np.flatnonzero(table.run & (table.slot >= 0) & (table.known > table.scheduled))
        rest = -(-table.known[running] // size) - table.trunk[running] - table.cols[running]
        reserved = max(needs.total, int(rest.clip(0).sum())) + self._watermark

        def fits(group: Group) -> bool:
            nonlocal budget, reserved
            if budget <= 0 or group.flights or self._widths + group.width > self._max_width:
                return False
            tokens, shared = self._lengths(group)
            hits = self.kv.take_prefix(group, group.prefix(shared), shared // size)
            room = -(-tokens // size) - hits + group.width
            if self._running and self.kv.pool.free < reserved + room:
                self.kv.drop_prefix(group)
                return False
            reserved += room
            budget -= tokens - hits * size
            self._start(group, tokens, shared)
            return True

        return bool(self.waiting.admit(fits))

    def _lengths(self, group: Group) -> tuple[int, int]:
        """Tokens of the group's longest sequence, and how many whole blocks of tokens all its sequences can share."""
        longest = shortest = common = len(group.request.prompt)
        if group.live:
            table = self.kv.table
            seqs = table.of(group.number)
            longest, shortest = int(table.known[seqs].max()), int(table.known[seqs].min())
            common = group.common_length(seqs)
        return longest, min(common, shortest - 1) // self.block_size * self.block_size

    def _start(self, group: Group, tokens: int, shared: int) -> None:
        """Give a group its slots. Where several sequences resume, the first computes what they share for all."""
        table = self.kv.table
        hit = len(group.trunk) * self.block_size
        self.counters.prefix_queries += tokens
        self.counters.prefix_hits += hit
        if not group.live:
            group.cached_tokens = hit
            group.root()
        group.state = State.RUNNING
        self._running[group.number] = group
        self._widths += group.width
        seqs = table.of(group.number)
        self.kv.rest_on_trunk(group, seqs)
        running = seqs[table.run[seqs]].tolist()
        if len(seqs) == 1 or hit == shared:
            table.cap[seqs] = NO_CAP
            self.slots.open(running)
        else:
            self._leads[group.number] = running[0]
            table.cap[seqs] = 0
            table.cap[running[0]] = shared
            self.slots.open(running[:1])

    def _follow(self, group: Group, lead: int) -> None:
        """The lead has computed the common prefix: all sequences of the resumed group go on from it."""
        table = self.kv.table
        seqs = table.of(group.number)
        group.trunk.extend(table.tail[lead, : table.cols[lead]].tolist())
        self.kv.rest_on_trunk(group, seqs)
        table.cap[seqs] = NO_CAP
        self.slots.open(seqs[table.run[seqs] & (seqs != lead)].tolist())

    # Reading

    def _probe(self, chosen: Chosen, probes: ProbeTable) -> tuple[list[Segment], Ints]:
        """Ask each strategy what to read off its complete rows; the segments, and sequences forked for it."""
        table = self.kv.table
        target = table.known[chosen.seqs] + table.pending[chosen.seqs]
        complete = chosen.seqs[(chosen.end == target) & (table.probed[chosen.seqs] < target)]
        groups = table.group[complete]
        edges = np.flatnonzero(np.diff(groups, prepend=-1, append=-1)).tolist()
        ids, numbers = complete.tolist(), groups[edges[:-1]].tolist()
        segments: list[Segment] = []
        children: list[int] = []
        for number, begin, end in zip(numbers, edges, edges[1:], strict=False):
            group = self._groups[number]
            try:
                reads = group.strategy.probe(group, ids[begin:end] if end - begin < _NARROW else complete[begin:end])
                for read in reads:
                    if read.seqs is not None:
                        children += fork_now(self.kv, self.slots, group, read)
                parts = [probes.add(read) for read in reads]
            except Exception as error:
                self._broken.append((group, error))
                continue
            segments.append(Segment(group, reads[0].at if reads[0].seqs is None else reads[0].seqs, parts))
        return segments, ints(children)

    def _launch(self, plan: Plan, chosen: Chosen, segments: list[Segment], children: Ints) -> None:
        table, counters = self.kv.table, self.counters
        read = Entries()
        for segment in segments:
            read.add(segment.seqs)
        seqs = read.array()
        table.probed[seqs] = table.scheduled[seqs]
        table.pending[seqs[table.pipelined[seqs]]] += 1
        written = np.concatenate([chosen.seqs, children])
        groups = [self._groups[number] for number in np.unique(table.group[chosen.seqs]).tolist()]
        for group in groups:
            group.flights += 1
        births, eras, ends = table.birth[written], table.era[written], table.scheduled[written]
        self._flights.append(_Flight(plan.step, written, ends, births, eras, seqs, table.birth[seqs], segments, groups))
        counters.steps += 1
        counters.forward_tokens += len(plan.rows.tokens)
        counters.forks += len(plan.forks.dst) + len(children)
        counters.blocks_copied += len(plan.copies.dst)

    def apply(self, result: Result) -> list[Update]:
        """Confirm the oldest plan that is out and let strategies act on what it read; what changed, by request."""
        flight = self._flights.popleft()
        if flight.step != result.step:
            raise EngineMisuseError(f"results must come in order: expected those of step {flight.step}, got step {result.step}")
        self._confirm(flight)
        reading = Reading(result.reads)
        table = self.kv.table
        valid = table.birth[flight.read] == flight.read_births
        read = flight.read[valid]
        table.pending[read[table.pipelined[read]]] -= 1
        touched: list[tuple[Group, Update]] = []
        position = 0
        for group, seqs, parts in flight.segments:
            begin, position = position, position + len(seqs)
            if group.state is State.ENDED:
                continue
            update = Update(group.request.id)
            touched.append((group, update))
            if reading.bad(parts):
                update.error = NumericError(f"the model returned NaN, or nothing but -inf, for a row of request {group.request.id!r}")
                self.kv.unpublish(group)
                continue
            keep = None if valid[begin:position].all() else np.flatnonzero(valid[begin:position]).tolist()
            self._advance(group, seqs if keep is None else [int(seqs[i]) for i in keep], reading.of(parts, keep), update)
        self._editor.flush()
        self._park(read)
        return self._close(touched)

    def _confirm(self, flight: _Flight) -> None:
        """What the plan computed counts from now on, for sequences that still hold the blocks it wrote."""
        for group in flight.groups:
            group.flights -= 1
        table = self.kv.table
        held = (table.birth[flight.seqs] == flight.births) & (table.era[flight.seqs] == flight.eras)
        seqs = flight.seqs[held]
        table.computed[seqs] = flight.ends[held]
        filled = seqs[table.computed[seqs] // self.block_size > table.published[seqs]]
        for seq in filled.tolist():
            self.kv.publish(self._groups[int(table.group[seq])], seq)
        for number, lead in list(self._leads.items()):
            if table.computed[lead] >= table.cap[lead]:
                del self._leads[number]
                self._follow(self._groups[number], lead)

    def _advance(self, group: Group, seqs: Ids, reads: list[Any], update: Update) -> None:
        strategy = group.strategy
        if strategy.lockstep:
            group.expect -= len(seqs)
            group.held.append((seqs, reads))
            if group.expect:
                return
            seqs = np.concatenate([ints(part) for part, _ in group.held])
            reads = [join(parts) for parts in zip(*(part for _, part in group.held), strict=True)]
            group.held = []
        self._edit(group, lambda: strategy.advance(group, seqs, reads), update)

    def _edit(self, group: Group, decide: Callable[[], list[Edit]], update: Update) -> None:
        try:
            self._editor.apply(group, decide(), update)
        except Exception as error:
            self._editor.flush()
            update.error = failure(group, error)

    def _park(self, read: Ints) -> None:
        """Sequences with nothing to compute keep their blocks and give up their slots."""
        table = self.kv.table
        idle = read[table.alive[read] & (table.slot[read] >= 0) & (table.known[read] == table.scheduled[read]) & (table.pending[read] == 0)]
        if len(idle):
            waiting = [bool(self._groups[int(number)].held) for number in table.group[idle]]
            self.slots.close(np.unique(idle[~np.array(waiting)]))

    def _close(self, touched: list[tuple[Group, Update]]) -> list[Update]:
        """End the groups that are over; fail those that have nothing left to compute and are not."""
        for group, update in touched:
            self.counters.generated_tokens += sum(len(event.tokens) for event in update.events if isinstance(event, Emit))
            if update.error is None and not group.held and group.unfinished and hopeless(group, self.kv):
                update.error = failure(group, RuntimeError("no sequence to run, no Ask and no Finish after its last edits"))
            if update.error is not None or not group.unfinished:
                self._end(group, update, "error")
        return [update for _, update in touched]

    def take_ended(self) -> list[Update]:
        """Requests that ended while a step was planned."""
        for group, error in self._broken:
            if group.state is not State.ENDED:
                self._ended.append(self._end(group, Update(group.request.id, error=failure(group, error)), "error"))
        ended, self._broken, self._ended = self._ended, [], []
        return ended

    def abandon(self, error: BaseException) -> list[Update]:
        """The oldest plan that is out, or a later one, raised: every request with rows in any of them ends."""
        groups = {group.number: group for flight in self._flights for group in flight.groups}
        self._flights.clear()
        updates = []
        for group in groups.values():
            if group.state is not State.ENDED:
                cause = StepFailedError(f"the step that computed request {group.request.id!r} failed: {type(error).__name__}: {error}")
                cause.__cause__ = error
                self.kv.unpublish(group)
                updates.append(self._end(group, Update(group.request.id, error=cause), "error"))
        return updates

    def _end(self, group: Group, update: Update, reason: str) -> Update:
        """Release everything a group holds; outputs that are not finished end for `reason`."""
        update.events += [Finish(index, reason) for index in sorted(group.unfinished)]
        update.done = True
        if group.state is State.RUNNING:
            del self._running[group.number]
            self._widths -= group.width
        else:
            self.waiting.discard()
        self._leads.pop(group.number, None)
        seqs = self.kv.table.of(group.number)
        self.slots.close(seqs)
        self.kv.drop_prefix(group)
        self.kv.drop(seqs)
        group.unfinished.clear()
        group.state = State.ENDED
        del self._groups[group.number], self._by_id[group.request.id]
        return update

    def check(self) -> None:
        """Raise BlockAccountingError when references, free blocks or slots contradict the live sequences."""
        self.kv.check(list(self._groups.values()))
        table = self.kv.table
        slots = table.slot[table.alive & (table.slot >= 0)]
        if len(np.unique(slots)) != len(slots) or len(slots) + self.slots.free != self.max_num_seqs:
            raise BlockAccountingError(f"{len(slots)} slots in use and {self.slots.free} free, of {self.max_num_seqs}")
        if self._widths != sum(group.width for group in self._running.values()):
            raise BlockAccountingError(f"widths of running groups add up differently from {self._widths}")


def failure(group: Group, error: Exception) -> PageforkError:
    """The typed error with which a request ends when its strategy raised."""
    if isinstance(error, PageforkError):
        return error
    cause = StepFailedError(f"{type(group.strategy).__name__} failed for request {group.request.id!r}: {type(error).__name__}: {error}")
    cause.__cause__ = error
    return cause

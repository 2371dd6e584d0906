"""Continuous batching: which sequences compute which tokens in the next step, and what follows from the reads.

Every step computes, for as many sequences as fit, the tokens between what is scheduled and what is known.
One-token rows go first and always fit (admission sees to that); longer ones (prompts, resumed sequences)
share the rest of the token budget in order, in chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import endings, metering
from .accounting import Counters
from .edits import Editor, Update, going_on
from .errors import EngineMisuseError, InvalidRequestError, PageforkError
from .group import Group, State
from .kv_manager import KVManager, Written
from .plan import Plan, Reads, Result, Rows
from .planning import Chosen, assemble, shared_runs, tokens_of
from .probing import Asked, ProbeTable, ask
from .reading import Flight, Reading, first_why, generation
from .request import Request
from .residents import Residents
from .scoring import Part, scored, targets
from .strategies.base import Edit, Finish, Ids, Strategy, discover, make


@dataclass
class Scheduler:
    """Plans steps over `num_blocks` cache blocks. `lag` plans may be out before their results are applied.

    max_num_seqs: sequences with a row in one step. max_num_batched_tokens: tokens of one step.
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
        discover()
        self.kv = KVManager(self.num_blocks, self.block_size, self.enable_prefix_caching)
        self.residents = Residents(self.kv, self.max_num_seqs, self.max_num_batched_tokens)
        self._editor = Editor(self.kv, self.residents.slots)
        self._groups: dict[int, Group] = {}
        self._by_id: dict[str, Group] = {}
        self._flights: deque[Flight] = deque()
        self._unscored: dict[int, Group] = {}  # whose prompt tokens are to be scored, by number
        self._arrivals = 0
        self._broken: list[tuple[Group, BaseException]] = []  # their strategy raised while a step was planned

    def validate(self, request: Request) -> Strategy:
        """The strategy for a request. Raises InvalidRequestError when it could never run."""
        if request.id in self._by_id:
            raise InvalidRequestError(f"request id {request.id!r} is in use by a request that has not finished")
        strategy = make(request)
        width = strategy.footprint().width
        if width > self.residents.max_width:
            setting = "max_num_seqs" if self.max_num_seqs == self.residents.max_width else "max_num_batched_tokens"
            raise endings.too_wide(width, request.params, self.residents.max_width, setting)
        blocks = -(-len(request.prompt) // self.block_size) + width
        if blocks > self.num_blocks - 1:
            raise endings.too_large(len(request.prompt), width, blocks, self.num_blocks - 1, self.block_size)
        return strategy

    def add(self, request: Request) -> int:
        """Queue a request; how many outputs it will have. Raises InvalidRequestError when it could never run."""
        strategy = self.validate(request)
        if not self._groups and not self._flights:
            self.residents.slots.forget()
            self.kv.table.shrink()
        group = Group(self._arrivals, request, strategy, self.kv.table)
        request.arrival = self._arrivals
        group.order = (request.priority if self.policy == "priority" else 0, request.arrival)
        self._arrivals += 1
        self._groups[group.number] = self._by_id[request.id] = group
        if not group.is_scored:
            self._unscored[group.number] = group
        self.residents.waiting.push(group)
        self.counters.prompt_tokens += len(request.prompt)
        return group.outputs

    def abort(self, request_id: str) -> Update | None:
        """End a request at whatever phase it is; None when there is none of that id."""
        group = self._by_id.get(request_id)
        return None if group is None else self._end(group, Update(request_id), "abort")

    def fail(self, request_id: str, error: PageforkError) -> Update | None:
        """End a request with an error; None when there is none of that id."""
        group = self._by_id.get(request_id)
        return None if group is None else self._end(group, Update(request_id, error=error), "error")

    def answer(self, request_id: str, values: list[float]) -> Update | None:
        """Values for the Ask of a request; None when it has ended meanwhile, or has no Ask out."""
        group = self._by_id.get(request_id)
        if group is None or not group.asked:
            return None
        update = Update(request_id)
        group.asked = False
        self._edit(group, update, (), (), group.strategy.answer, group, values)
        self._editor.flush()
        return self._close([(group, update)])[0]

    @property
    def live_sequences(self) -> int:
        """Sequences that hold blocks, of all groups."""
        return int(np.count_nonzero(self.kv.table.alive))

    @property
    def shared_block_ratio(self) -> float:
        """Of the blocks that the running sequences would hold if none shared, the part that is not needed."""
        return self.kv.shared_ratio

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    @property
    def num_running(self) -> int:
        return len(self.residents.running)

    @property
    def in_flight(self) -> int:
        """Plans whose results have not been applied."""
        return len(self._flights)

    @property
    def ahead(self) -> int:
        """How many plans had better stay out while the next is made: none where a sequence of the newest waits for its reads."""
        return self.lag if not self._flights or self._flights[-1].pipelined else 0

    def schedule(self) -> Plan | None:
        """The next step, or None when nothing can be computed now. Ended requests come with the next apply()."""
        if len(self._flights) > self.lag:
            raise EngineMisuseError(
                f"{len(self._flights)} plans are out, the scheduler was made for {self.lag} besides the current one"
            )
        chosen, needs = self.residents.choose()
        if len(chosen.seqs) == 0:
            return None
        written = self.kv.write(chosen.seqs, chosen.start, chosen.end, needs)
        offset, tokens = tokens_of(chosen, self.kv, self._groups)
        table = self.kv.table
        table.row[chosen.seqs] = np.arange(len(chosen.seqs))
        rows = Rows(table.slot[chosen.seqs], chosen.start, offset, tokens, shared_runs(chosen, self.kv))
        probes = ProbeTable()
        asked = ask(chosen, self._groups, self.kv, self.residents.slots, probes)
        self._broken += asked.broken
        plan = assemble(self.counters.steps, written, probes, self.kv, self.residents.slots, self._groups, rows)
        self.kv.settle(written)
        target, scores = targets(chosen, offset, table, self._unscored) if self._unscored else (None, [])
        if target is not None:
            plan.probes.append(target)
        self._launch(plan, chosen, written, asked, scores)
        return plan

    def _launch(self, plan: Plan, chosen: Chosen, written: Written, asked: Asked, scores: list[Part]) -> None:
        table, counters, seqs = self.kv.table, self.counters, asked.seqs
        table.probed[seqs] = table.scheduled[seqs]
        table.pending[seqs[table.pipelined[seqs]]] += 1
        computed = np.concatenate([chosen.seqs, asked.children])
        groups = metering.count(chosen, written, self.kv, self._groups)
        births, eras, ends = table.birth[computed], table.era[computed], table.scheduled[computed]
        read_births = table.birth[seqs]
        bounds = [probe.groups for probe in plan.probes]
        pipelined = bool(table.pipelined[chosen.seqs].all())
        self._flights.append(
            Flight(plan.step, computed, ends, births, eras, seqs, read_births, asked.segments, scores, groups, bounds, pipelined)
        )
        counters.steps += 1
        counters.forward_tokens += len(plan.rows.tokens)
        counters.blocks_copied += len(plan.copies.dst)

    def apply(self, result: Result) -> list[Update]:
        """Confirm the oldest plan that is out and let strategies act on what it read; what changed, by request."""
        flight = self._flights.popleft()
        if flight.step != result.step:
            raise EngineMisuseError(f"results must come in order: expected those of step {flight.step}, got step {result.step}")
        self.residents.confirm(flight, self._groups)
        reading = Reading(result.reads, flight.bounds)
        table = self.kv.table
        valid = table.birth[flight.read] == flight.read_births
        all_valid = bool(valid.all())
        read = flight.read[valid]
        table.pending[read[table.pipelined[read]]] -= 1
        touched: dict[int, tuple[Group, Update]] = {}
        for part in flight.scores:
            self._score(part, result.reads[-1], touched)
        position, ended = 0, State.ENDED
        for group, seqs, rows, parts, children in flight.segments:
            begin, position = position, position + len(seqs)
            if group.state is ended:
                continue
            if group.number in touched:  # its prompt was scored, or it has one-token rows and longer ones: two segments
                update = touched[group.number][1]
                if update.error is not None:
                    continue
            else:
                update = Update(group.request.id)
                touched[group.number] = group, update
            if reading.any_bad and reading.bad(parts):
                self._unusable(group, update, reading.why(parts))
                continue
            keep = None
            if not all_valid and not valid[begin:position].all():
                keep = np.flatnonzero(valid[begin:position]).tolist()
                seqs = [int(seqs[i]) for i in keep]  # noqa: PLW2901
            reads = reading.of(parts, keep)
            if group.strategy.lockstep:
                group.expect -= rows
                group.held.append((seqs, reads, children))
                if group.expect:
                    continue
                seqs, reads, children = generation(group)  # noqa: PLW2901
            self._edit(group, update, seqs, children, group.strategy.advance, group, seqs, reads)
        self._editor.flush()
        return self._close(touched.values())

    def _score(self, part: Part, reads: Reads, touched: dict[int, tuple[Group, Update]]) -> None:
        """Deliver the log-probs of prompt tokens."""
        group = part.group
        if group.state is State.ENDED:
            return
        update = Update(group.request.id)
        touched[group.number] = group, update
        if reads.bad[part.first : part.last].any():
            self._unusable(group, update, first_why(reads, part.first, part.last))
        else:
            update.scores.append(scored(part, reads))

    def _unusable(self, group: Group, update: Update, why: str | None) -> None:
        """End a group that got no usable logits. Where that is the model's fault its blocks can't be trusted either."""
        update.error = endings.unusable(group, why)
        if why is None:
            self.kv.unpublish(group)

    def _edit(
        self, group: Group, update: Update, read: Ids, children: Ids, decide: Callable[..., list[Edit]], *args: Any
    ) -> None:
        try:
            self._editor.apply(group, decide(*args), update, read, children)
        except BaseException as error:  # noqa: BLE001 - what a strategy calls may raise anything; it ends its own request
            update.error = endings.strategy_failed(group, error)
        if group.usage.forward_tokens > group.request.max_forward_tokens and group.unfinished and update.error is None:
            update.error = endings.over_budget(group)

    def _close(self, touched: Collection[tuple[Group, Update]]) -> list[Update]:
        """End the groups that are over; fail those that have nothing left to compute and are not."""
        self.counters.generated_tokens = self._editor.emitted
        busy = going_on(self.kv)
        for group, update in touched:
            if update.error is None and group.unfinished and (group.number in busy or group.flights):
                continue
            if group.unfinished and not group.asked and not group.held and update.error is None:
                update.error = endings.strategy_failed(
                    group, RuntimeError("no sequence to run, no Ask and no Finish after its last edits")
                )
            if update.error is not None or not group.unfinished:
                self._end(group, update, "error")
        return [update for _, update in touched]

    def take_ended(self) -> list[Update]:
        """Requests that ended while a step was planned."""
        ended = [(group, endings.exhausted(group, self.num_blocks - 1, self.block_size)) for group in self.residents.exhausted]
        ended += [
            (group, endings.strategy_failed(group, error)) for group, error in self._broken if group.state is not State.ENDED
        ]
        self.residents.exhausted, self._broken = [], []
        return [self._end(group, Update(group.request.id, error=error), "error") for group, error in ended]

    def abandon(self, error: BaseException) -> list[Update]:
        """The oldest plan that is out, or a later one, raised: every request with rows in any of them ends."""
        groups = {group.number: group for flight in self._flights for group in flight.groups}
        self._flights.clear()
        updates = []
        for group in groups.values():
            if group.state is not State.ENDED:
                self.kv.unpublish(group)
                updates.append(self._end(group, Update(group.request.id, error=endings.step_failed(group, error)), "error"))
        return updates

    def _end(self, group: Group, update: Update, reason: str) -> Update:
        """Release everything a group holds; outputs that are not finished end for `reason`."""
        update.events += [Finish(index, reason) for index in sorted(group.unfinished)]
        update.done = True
        update.cached_tokens, update.preemptions, update.usage = group.cached_tokens, group.preemptions, group.usage
        if group.request.params.trace:
            try:
                update.trace = metering.traced(group)
            except BaseException as failed:  # noqa: BLE001 - as any other code of a strategy
                update.error = update.error or endings.strategy_failed(group, failed)
        if group.state is not State.ENDED:
            self.residents.remove(group)
        group.unfinished.clear()
        self._unscored.pop(group.number, None)
        del self._groups[group.number], self._by_id[group.request.id]
        return update

    def check(self) -> None:
        """Raise BlockAccountingError when references, free blocks or slots contradict the live sequences."""
        self.residents.check()

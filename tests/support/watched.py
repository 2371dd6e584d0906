"""A harness that counts the situations in which its requests were, so that a test can see that it has tested them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from pagefork.scheduler.errors import KVExhaustedError, ValueFunctionError
from pagefork.scheduler.group import Group, State
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.plan import Ints, Plan, Result, Spec
from pagefork.scheduler.search_params import BeamSearchParams, MCTSParams
from support.harness import Harness, Tracked
from support.searches_alone import outputs_alone

KINDS = ["sampling", "beam", "diverse beam", "contrastive", "mcts"]
TREES = ["mcts with values", "mcts with rollouts", "mcts of several outputs", "mcts without reuse", "mcts in waves"]
SITUATIONS = [
    *(f"{kind}: complete" for kind in [*KINDS, *TREES]),
    *(f"{kind}: complete after a preemption" for kind in [*KINDS, *TREES]),
    *("mcts: blocks of a parked node taken", "mcts: values come after a preemption", "mcts: values come after an abort"),
    *(f"abort {phase}" for phase in ("in the queue", "with rows out", "with an Ask out", "after a preemption")),
    *(f"preemption {phase}" for phase in ("with rows out", "with an Ask out", "for want of blocks")),
    *(f"result after {what}" for what in ("the end of its request", "a preemption", "an eviction", "the end of a sequence")),
    *("a slot is source and destination in one plan", "several read off one row", "blocks copied", "rows share a trunk"),
    *("a cached prefix is found", "equal blocks become one", "sequences wait for one that leads", "values failed", "no room"),
]


def kinds(params: CommonParams) -> list[str]:
    """What a request is, in words."""
    name = str(type(params).__struct_config__.tag or "toy")
    if isinstance(params, BeamSearchParams) and params.num_beam_groups > 1:
        return ["diverse beam"]
    if not isinstance(params, MCTSParams):
        return [name]
    told = [params.value_fn, params.rollout_tokens, params.n > 1, not params.reuse_tree, params.leaf_batch_size > 1]
    return [name, *(kind for kind, there in zip(TREES, told, strict=True) if there)]


class Watched(Harness):
    """Counts in `seen`. Searches are compared with what their references find."""

    def __init__(self, seen: Counter[str], *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.seen = seen
        self.forced = 0  # preemptions
        self._kinds: dict[str, list[str]] = {}
        self._submit, self.runner.submit = self.runner.submit, self._submitted  # type: ignore[method-assign]
        self._apply, self.scheduler.apply = self.scheduler.apply, self._applied  # type: ignore[method-assign]
        kv = self.scheduler.kv
        self._evict, kv.evict = kv.evict, self._evicted  # type: ignore[method-assign]

    def add(self, prompt: list[int], params: CommonParams, *args: Any, **options: Any) -> str:
        name = super().add(prompt, params, *args, **options)
        self._kinds[name] = kinds(params)
        return name

    def _expected(self, prompt: list[int], spec: Spec, params: CommonParams, stops: frozenset[int]) -> list[list[int]] | None:
        return outputs_alone(prompt, spec, params, stops) or super()._expected(prompt, spec, params, stops)

    def _see(self, group: Group, what: str) -> None:
        self.seen.update(f"{kind}: {what}" for kind in self._kinds[group.request.id])

    def _submitted(self, plan: Plan) -> None:
        forks = plan.forks
        self.seen["a slot is source and destination in one plan"] += bool(set(forks.src.tolist()) & set(forks.dst.tolist()))
        self.seen["several read off one row"] += any(len(np.unique(probe.at)) < len(probe.at) for probe in plan.probes)
        self.seen["blocks copied"] += len(plan.copies.dst) > 0
        self.seen["rows share a trunk"] += len(plan.rows.trunk) > 0
        self.seen["sequences wait for one that leads"] += bool(self.scheduler.residents._resuming._waiting)
        for group in self.between_parts():
            self._see(group, "read in parts")
        self._submit(plan)

    def _applied(self, result: Result) -> Any:
        flight, table = self.scheduler._flights[0], self.scheduler.kv.table
        states = {segment[0].state for segment in flight.segments}
        born = table.birth[flight.seqs] == flight.births
        self.seen["result after the end of its request"] += State.ENDED in states
        self.seen["result after a preemption"] += State.WAITING in states
        self.seen["result after an eviction"] += bool((born & (table.era[flight.seqs] != flight.eras)).any())
        ended = np.repeat([segment[0].state is State.ENDED for segment in flight.segments], [len(s[1]) for s in flight.segments])
        gone = table.birth[flight.read] != flight.read_births
        self.seen["result after the end of a sequence"] += bool((gone & ~ended.astype(bool)).any())
        found = self._apply(result)
        self.seen["equal blocks become one"] += self.scheduler.kv.replaced
        self.seen["a cached prefix is found"] += self.scheduler.residents.prefix_hits > 0
        return found

    def _evicted(self, group: Group, seqs: Ints) -> None:
        assert (self.scheduler.kv.table.slot[seqs] < 0).all(), "the blocks of a running sequence are taken"
        if self.scheduler.kv.table.cols[seqs].any():
            self._see(group, "blocks of a parked node taken")
        self._evict(group, seqs)

    def between_parts(self) -> list[Group]:
        """Running groups of which a part of a generation has been read."""
        return [group for group in self.scheduler.residents.running.values() if group.held]

    def asked(self) -> list[str]:
        """Requests that wait for values."""
        return [name for name, group in self.scheduler._by_id.items() if group.asked]

    def preempt(self, group: Group) -> None:
        """Take all blocks of a group."""
        self.forced += 1
        self._phase("preemption", group)
        self.scheduler.residents._preempt(group)
        self.scheduler.check()

    def _phase(self, what: str, group: Group) -> None:
        self.seen[f"{what} with rows out"] += group.flights > 0
        if group.held:
            self._see(group, f"{what} between parts")
        self.seen[f"{what} with an Ask out"] += group.asked

    def abort(self, name: str) -> None:
        group = self.scheduler._by_id[name]
        self._phase("abort", group)
        waits = group.state is State.WAITING
        self.seen["abort in the queue"] += waits and not group.live
        self.seen["abort after a preemption"] += waits and group.preemptions > 0
        super().abort(name)
        self.scheduler.check()

    def answer(self) -> None:
        """Answer the oldest Ask, then again: nobody waits for that."""
        name, ask = self.asks.pop(0)
        values = list(ask.function(ask.items))
        group = self.scheduler._by_id.get(name)
        if group is None:
            assert self.scheduler.answer(name, values) is None
            self.seen.update(f"{kind}: values come after an abort" for kind in self._kinds[name])
            return
        if group.state is State.WAITING:
            self._see(group, "values come after a preemption")
        self.asks.insert(0, (name, ask))
        super().answer()
        if not group.asked:
            assert self.scheduler.answer(name, values) is None, "values were taken that nobody waits for"

    def fail(self) -> None:
        """The values of the oldest Ask can't be had."""
        name, _ = self.asks.pop(0)
        update = self.scheduler.fail(name, ValueFunctionError("no values"))
        assert (update is None) == self.requests[name].done
        self.take([update] if update is not None else [])
        self.seen["values failed"] += 1

    def run(self) -> None:
        while self.asks:
            self.answer()
        super().run()
        self.seen["preemption for want of blocks"] += self.scheduler.residents.preemptions > self.forced
        for name, tracked in self.requests.items():
            self.seen["no room"] += isinstance(tracked.error, KVExhaustedError)
            if set(tracked.reasons.values()) <= {"stop", "length"}:
                self._count_complete(name, tracked)

    def _count_complete(self, name: str, tracked: Tracked) -> None:
        for kind in self._kinds[name]:
            self.seen[f"{kind}: complete"] += 1
            self.seen[f"{kind}: complete after a preemption"] += tracked.preemptions > 0

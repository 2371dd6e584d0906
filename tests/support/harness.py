"""A scheduler driven against the oracle runner; what it delivers is compared with what it must."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagefork.scheduler.accounting import Trace, Usage
from pagefork.scheduler.edits import Update
from pagefork.scheduler.errors import PageforkError
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.plan import Spec
from pagefork.scheduler.request import Request
from pagefork.scheduler.scheduler import Scheduler
from pagefork.scheduler.strategies.base import Ask, Emit
from support.oracle import OracleRunner, continuation, scores
from support.toys import (
    BeamToyParams,
    ForkToyParams,
    LookToyParams,
    RolloutToyParams,
    beam_reference,
    fork_reference,
    look_reference,
    rollout_reference,
)


@dataclass
class Tracked:
    """A request and what came of it. Where `expected` is None its tokens are not compared."""

    expected: list[list[int]] | None
    tokens: list[list[int]]
    prompt: list[int] = field(default_factory=list)
    spec: Spec | None = None
    scored: list[tuple[int, float, list[int]]] | None = None  # of prompt tokens: position, log-prob, top ids
    reasons: dict[int, str] = field(default_factory=dict)
    scores: dict[int, float | None] = field(default_factory=dict)
    logps: dict[int, list[float]] = field(default_factory=dict)
    preemptions: int = 0
    usage: Usage | None = None
    trace: Trace | None = None
    done: bool = False
    error: PageforkError | None = None


class Harness:
    """Requests go in with add(); step() plans, computes and, once `lag` plans are out, applies the oldest."""

    def __init__(self, num_blocks: int = 40, block_size: int = 4, slots: int = 12, budget: int = 24, **settings: Any) -> None:
        self.lag = settings.get("lag", 0)
        self.scheduler = Scheduler(num_blocks, block_size, slots, budget, **settings)
        self.runner = OracleRunner(num_blocks, block_size, slots, budget=budget)
        self.requests: dict[str, Tracked] = {}
        self.asks: list[tuple[str, Ask]] = []  # that wait for their values
        self.answer_at_once = True

    def add(
        self,
        prompt: list[int],
        params: CommonParams,
        stops: frozenset[int] = frozenset(),
        expected: list[list[int]] | None = None,
        rank: bool = False,
        **options: Any,
    ) -> str:
        """Queue a request of any strategy; its id. Tokens are compared with `expected`, or what is known to be expected."""
        name = str(len(self.requests))
        count = params.max_tokens or 1
        spec = Spec(
            prompt_len=len(prompt),
            seed=int(name),
            temperature=getattr(params, "temperature", None) or 0.0,
            frequency_penalty=params.frequency_penalty,
            rank=rank,
        )
        request = Request(
            name, np.array(prompt, np.int32), params, spec, len(prompt) + count, end_ids=stops, model_end_ids=stops, **options
        )
        outputs = self.scheduler.add(request)
        if expected is None:
            expected = self._expected(prompt, spec, params, stops)
        scored: list[tuple[int, float, list[int]]] | None = None if request.prompt_logprobs is None else []
        self.requests[name] = Tracked(expected, [[] for _ in range(outputs)], prompt, spec, scored)
        return name

    def _expected(self, prompt: list[int], spec: Spec, params: CommonParams, stops: frozenset[int]) -> list[list[int]] | None:
        """The outputs of sampling and of the toys, from the oracle's model alone."""
        count = params.max_tokens or 1
        match params:
            case SamplingParams():
                return [continuation(prompt, spec, stream, count, stops) for stream in range(params.width)]
            case BeamToyParams():
                return beam_reference(prompt, spec, params.width, count)
            case LookToyParams():
                return [look_reference(prompt, spec, params.branch, count)]
            case ForkToyParams():
                return [fork_reference(prompt, spec, params.branch, count)]
            case RolloutToyParams():
                return [rollout_reference(prompt, spec, params.branch, params.depth, count)]
            case _:
                return None

    def step(self) -> bool:
        """One step, then every check; whether anything was planned, applied or ended."""
        plan = self.scheduler.schedule()
        ended = self.scheduler.take_ended()
        self.take(ended)
        if plan is not None:
            self.runner.submit(plan)
        applied = self.scheduler.in_flight > (self.lag if plan is not None else 0)
        if applied:
            self.take(self.scheduler.apply(self.runner.collect()))
        while self.answer_at_once and self.asks:
            self.answer()
        self.scheduler.check()
        return plan is not None or applied or bool(ended)

    def answer(self) -> None:
        """Answer the oldest Ask."""
        name, ask = self.asks.pop(0)
        if not self.requests[name].done:
            self.take([self.scheduler.answer(name, list(ask.function(ask.items)))])

    def run(self) -> None:
        """Step until everything has ended; then nothing may be held."""
        for _ in range(100_000):
            if not self.scheduler.has_unfinished and not self.scheduler.in_flight:
                break
            assert self.step() or self.asks, "nothing was planned although requests are unfinished"
            while self.asks:
                self.answer()
        self.assert_idle()

    def assert_idle(self) -> None:
        assert self.scheduler.kv.pool.free == self.scheduler.num_blocks - 1
        assert self.scheduler.residents.slots.free == self.scheduler.max_num_seqs
        assert len(self.scheduler.kv.table) == 0
        assert all(tracked.done for tracked in self.requests.values())
        delivered = sum(len(tokens) for tracked in self.requests.values() for tokens in tracked.tokens)
        assert self.scheduler.counters.generated_tokens == delivered

    def abort(self, name: str) -> None:
        update = self.scheduler.abort(name)
        if update is not None:
            self.take([update])

    def take(self, updates: list[Update]) -> None:
        for update in updates:
            tracked = self.requests[update.request_id]
            assert not tracked.done, "an update after the terminal one"
            for event in update.events:
                assert event.index not in tracked.reasons, "an event of an output that is complete"
                if isinstance(event, Emit):
                    tracked.tokens[event.index] += event.tokens
                    tracked.logps.setdefault(event.index, []).extend(event.logps)
                else:
                    tracked.reasons[event.index] = event.reason
                    tracked.scores[event.index] = event.score
            for part in update.scores:
                assert tracked.scored is not None, "prompt tokens are scored that nobody asked for"
                rows = zip(part.logps, part.top_ids.tolist(), strict=True)
                tracked.scored += [(part.begin + i, logp, top) for i, (logp, top) in enumerate(rows)]
            self.asks += [(update.request_id, ask) for ask in update.asks]
            tracked.usage, tracked.trace, tracked.preemptions = update.usage, update.trace, update.preemptions
            tracked.done = update.done
            tracked.error = update.error
            if update.done:
                assert sorted(tracked.reasons) == list(range(len(tracked.tokens))), "ended without a terminal for every output"

    def assert_expected(self, *errors: type[PageforkError]) -> None:
        """Every finished request delivered exactly what it must, every aborted one a part of it, and only `errors` ended any."""
        for name, tracked in self.requests.items():
            assert tracked.error is None or isinstance(tracked.error, errors), f"request {name} failed: {tracked.error}"
            if tracked.scored is not None:
                self._assert_scored(name, tracked)
            if tracked.expected is None:
                continue
            if tracked.done and set(tracked.reasons.values()) <= {"stop", "length"}:
                assert tracked.tokens == tracked.expected[: len(tracked.tokens)], f"request {name} got other tokens than alone"
            else:
                for tokens, expected in zip(tracked.tokens, tracked.expected, strict=False):
                    assert tokens == expected[: len(tokens)], f"request {name} got tokens that are not its own"

    def _assert_scored(self, name: str, tracked: Tracked) -> None:
        """Every prompt token but the first was scored once, in order and from all tokens before it; of ended requests a part."""
        assert tracked.scored is not None and tracked.spec is not None
        complete = tracked.done and set(tracked.reasons.values()) <= {"stop", "length"}
        places = [position for position, _, _ in tracked.scored]
        assert places == list(range(1, len(tracked.prompt) if complete else len(places) + 1)), f"request {name}: scored {places}"
        for position, logp, top in tracked.scored:
            values = scores(tracked.prompt[:position], tracked.spec)
            assert np.float32(values[tracked.prompt[position]]) == np.float32(logp), f"request {name}: position {position}"
            assert top == np.argsort(-values, kind="stable")[: len(top)].tolist()

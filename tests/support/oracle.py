"""A runner whose cache blocks store token ids and whose model is a hash of what it reads through the block table.

Any aliasing, stale prefix hit, missing copy-on-write, wrong slot or wrong history changes the tokens, so
exact equality with `continuation`, which knows no blocks, is demanded everywhere.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from pagefork.scheduler.plan import LAST_TOKEN, Kind, Opens, Plan, Probe, Reads, Result, Rows, Spec

VOCAB = 23
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (int(value) & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def scores(tokens: list[int], spec: Spec) -> NDArray[np.float64]:
    """The model: one score per token of the vocabulary, from everything before it and, with history, the spec."""
    context = mix(len(tokens), *tokens, spec.prompt_len if spec.history else 0)
    rng = np.random.default_rng(context)
    return np.log(rng.random(VOCAB))


def draw(tokens: list[int], spec: Spec, stream: int) -> int:
    """The token after `tokens`, from a stream of the request's seed."""
    values = scores(tokens, spec)
    if spec.temperature > 0:
        values = values + np.random.default_rng(mix(spec.seed, stream, len(tokens))).gumbel(size=VOCAB)
    return int(np.argmax(values))


def continuation(prompt: list[int], spec: Spec, stream: int, count: int, stops: frozenset[int] = frozenset()) -> list[int]:
    """What one sequence must generate: at most `count` tokens, up to and including a stop token."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < count:
        tokens.append(draw(tokens, spec, stream))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


class OracleRunner:
    """Executes plans on blocks of token ids; asserts what every plan must keep."""

    def __init__(self, num_blocks: int, block_size: int, slots: int, max_len: int = 512, budget: int = 10**9) -> None:
        self.size = block_size
        self.budget = budget
        self.cache = np.full((num_blocks, block_size), -1, np.int64)
        self.table = np.zeros((slots, -(-max_len // block_size)), np.int64)
        self.history = np.full((slots, max_len), -1, np.int64)
        self.last = np.full(slots, -1, np.int64)
        self.stream = np.zeros(slots, np.int64)
        self.spec: list[Spec | None] = [None] * slots
        self.poison: set[int] = set()  # steps in which every read is NaN
        self.results: deque[Result] = deque()

    def submit(self, plan: Plan) -> None:
        self._fork(plan)
        for slot in plan.closes:
            self.spec[slot] = None
            self.table[slot] = 0
            self.history[slot] = -1
            self.last[slot] = -1
        self._open(plan.opens, plan.specs)
        self.table[plan.tables.slot, plan.tables.column] = plan.tables.block
        assert not set(plan.copies.src.tolist()) & set(plan.copies.dst.tolist())
        assert len(set(plan.copies.dst.tolist())) == len(plan.copies.dst)
        self.cache[plan.copies.dst] = self.cache[plan.copies.src]
        positions = self._write(plan.rows)
        reads = [self._read(probe, plan.rows, positions) for probe in plan.probes]
        if plan.step in self.poison:
            for read in reads:
                read.bad[:] = True
        self.results.append(Result(plan.step, reads))

    def collect(self) -> Result:
        return self.results.popleft()

    def _fork(self, plan: Plan) -> None:
        forks = plan.forks
        assert len(set(forks.dst.tolist())) == len(forks.dst)
        state = [(self.table[s].copy(), self.history[s].copy(), self.last[s], self.spec[s]) for s in forks.src]
        for dst, stream, (table, history, last, spec) in zip(forks.dst, forks.stream, state, strict=True):
            assert spec is not None, "forked from a slot that is not open"
            self.table[dst], self.history[dst], self.last[dst], self.spec[dst] = table, history, last, spec
            self.stream[dst] = stream

    def _open(self, opens: Opens, specs: list[Spec]) -> None:
        for slot, spec, stream, begin, end in zip(opens.slot, opens.spec, opens.stream, opens.begin, opens.end, strict=True):
            self.spec[slot] = specs[spec]
            self.stream[slot] = stream
            self.table[slot] = 0
            self.history[slot] = -1
            self.history[slot, : end - begin] = opens.tokens[begin:end]
            self.last[slot] = -1

    def _write(self, rows: Rows) -> NDArray[np.int64]:
        assert len(set(rows.slot.tolist())) == len(rows.slot), "a slot has two rows"
        assert len(rows.tokens) <= self.budget
        positions = np.zeros(len(rows.tokens), np.int64)
        written: set[tuple[int, int]] = set()
        for slot, start, begin, end in zip(rows.slot, rows.start, rows.offset, rows.offset[1:], strict=False):
            assert self.spec[slot] is not None, "a row in a slot that is not open"
            for i in range(begin, end):
                position = start + i - begin
                token = rows.tokens[i] if rows.tokens[i] != LAST_TOKEN else self.last[slot]
                assert token >= 0
                block = self.table[slot, position // self.size]
                assert block != 0, "a row writes to the padding sink"
                assert (block, position % self.size) not in written, "two rows write one place"
                written.add((block, position % self.size))
                self.cache[block, position % self.size] = token
                self.history[slot, position] = token
                positions[i] = position
        for first, count, blocks in rows.trunk:
            shared = self.table[rows.slot[first : first + count], :blocks]
            assert count > 1 and (shared == shared[0]).all(), "rows named as sharing a trunk do not"
        return positions

    def _read(self, probe: Probe, rows: Rows, positions: NDArray[np.int64]) -> Reads:
        row_of = np.repeat(np.arange(len(rows.slot)), np.diff(rows.offset))
        contexts, specs = [], []
        for at, slot in zip(probe.at, probe.slot, strict=True):
            length = positions[at] + 1
            table = self.table[rows.slot[row_of[at]]]
            tokens = self.cache[table[: -(-length // self.size)]].reshape(-1)[:length].tolist()
            assert -1 not in tokens, "read a position that was never written"
            spec = self.spec[slot]
            assert spec is not None
            if spec.history:
                assert self.history[slot, :length].tolist() == tokens, "the slot's history is not what its blocks hold"
            contexts.append(tokens)
            specs.append(spec)
        count = len(contexts)
        bad = np.zeros(count, np.bool_)
        if probe.kind is Kind.SAMPLE:
            token = [
                draw(tokens, spec, self.stream[slot]) for tokens, spec, slot in zip(contexts, specs, probe.slot, strict=True)
            ]
            self.last[probe.slot] = token
            logp = [scores(tokens, spec)[t] for tokens, spec, t in zip(contexts, specs, token, strict=True)]
            return Reads(bad, np.array(token, np.int32), np.array(logp, np.float32), np.ones(count, np.int32))
        values = np.stack([scores(tokens, spec) for tokens, spec in zip(contexts, specs, strict=True)])
        top = np.argsort(-values, axis=1, kind="stable")[:, : probe.n].astype(np.int32)
        logp = np.take_along_axis(values, top, axis=1).astype(np.float32)
        if probe.kind is Kind.TOPN:
            return Reads(bad, top_id=top, top_logp=logp, top_p=np.exp(logp))
        assert probe.kind is Kind.TARGET and probe.target is not None
        own = values[np.arange(count), probe.target].astype(np.float32)
        rank = (values > own[:, None]).sum(1).astype(np.int32) + 1
        return Reads(bad, logp=own, rank=rank, top_id=top, top_logp=logp)

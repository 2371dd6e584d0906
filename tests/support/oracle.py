"""A runner whose cache blocks store token ids and whose model is a hash of what it reads through the block table.

Any aliasing, stale prefix hit, missing copy-on-write, wrong slot or wrong history changes the tokens, so
exact equality with `continuation`, which knows no blocks, is demanded everywhere.
"""

from __future__ import annotations

import itertools
from collections import deque
from functools import lru_cache

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
    return _scores(VOCAB, len(tokens), *tokens, spec.prompt_len if spec.history else 0)


@lru_cache(10_000)
def _scores(vocab: int, *context: int) -> NDArray[np.float64]:
    values = np.log(np.random.default_rng(mix(*context)).random(vocab))
    values.flags.writeable = False
    return values


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


def similarity(tokens: list[int], window: int = 0) -> float:
    """The largest of the hash-cosines in [-1, 1] between the last position and those before it, the last `window` (0: all).

    -1 where nothing is before it.
    """
    states = [0]
    for token in tokens:
        states.append(mix(states[-1], token))
    earlier = states[1:-1][-window:]
    return max((mix(state, states[-1]) / 2**63 - 1.0 for state in earlier), default=-1.0)


def ranks(values: NDArray[np.float64], tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """The rank of each of some tokens, 1 being the most probable; 0 for token -1."""
    found = (values[None, :] > values[tokens][:, None]).sum(1) + 1
    return np.where(tokens < 0, 0, found).astype(np.int32)


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
        positions = self._write(plan.rows, set(plan.copies.dst.tolist()))
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

    def _write(self, rows: Rows, copied: set[int]) -> NDArray[np.int64]:
        assert len(set(rows.slot.tolist())) == len(rows.slot), "a slot has two rows"
        assert len(rows.tokens) <= self.budget
        positions = np.zeros(len(rows.tokens), np.int64)
        written: set[tuple[int, int]] = set()
        for slot, start, begin, end in zip(rows.slot, rows.start, rows.offset, rows.offset[1:], strict=False):
            assert self.spec[slot] is not None, "a row in a slot that is not open"
            assert start % self.size or self.table[slot, start // self.size] not in copied, "copied to be overwritten whole"
            copied.discard(int(self.table[slot, start // self.size]))
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
        assert not copied, "copied and not written"
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
        if probe.kind is Kind.MERGE:
            return _merge(probe, values, specs)
        top, logp = _top(values, probe.n)
        if probe.kind is Kind.TOPN:
            reads = Reads(bad, top_id=top, top_logp=logp, top_p=np.exp(logp))
            if probe.processed:
                reads.top_rank = np.stack([ranks(v, t) * s.rank for v, t, s in zip(values, top, specs, strict=True)])
            if probe.window is not None:
                found = [similarity(tokens, int(window)) for tokens, window in zip(contexts, probe.window, strict=True)]
                reads.sim = np.array(found, np.float32)
            return reads
        assert probe.kind is Kind.TARGET and probe.target is not None
        own = values[np.arange(count), probe.target].astype(np.float32)
        rank = (values > own[:, None]).sum(1).astype(np.int32) + 1
        return Reads(bad, logp=own, rank=rank, top_id=top, top_logp=logp)


def _top(values: NDArray[np.float64], n: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The n best tokens of each row and their scores; -1 and -inf past the vocabulary."""
    top = np.argsort(-values, axis=1, kind="stable")[:, :n].astype(np.int32)
    logp = np.take_along_axis(values, top, axis=1).astype(np.float32)
    beyond = ((0, 0), (0, n - top.shape[1]))
    return np.pad(top, beyond, constant_values=-1), np.pad(logp, beyond, constant_values=-np.inf)


def _merge(probe: Probe, values: NDArray[np.float64], specs: list[Spec]) -> Reads:
    """The n best (entry, token) pairs of each group by bias + score, in float32; ties to the lower entry, then token."""
    assert probe.groups is not None and probe.bias is not None and probe.bias.dtype == np.float32
    assert probe.groups[0] == 0 and probe.groups[-1] == len(values) == len(probe.bias)
    logps = values.astype(np.float32)
    shape = len(probe.groups) - 1, probe.n
    parent, top, rank = (np.full(shape, fill, np.int32) for fill in (-1, -1, 0))
    score, logp = np.full(shape, -np.inf, np.float32), np.full(shape, -np.inf, np.float32)
    for g, (begin, end) in enumerate(itertools.pairwise(probe.groups.tolist())):
        sums = (probe.bias[begin:end, None] + logps[begin:end]).reshape(-1)
        best = np.argsort(-sums, kind="stable")[: probe.n]
        n = len(best)
        parent[g, :n], top[g, :n] = begin + best // VOCAB, best % VOCAB
        score[g, :n], logp[g, :n] = sums[best], logps[parent[g, :n], top[g, :n]]
        pairs = zip(parent[g, :n].tolist(), top[g, :n], strict=True)
        rank[g, :n] = [int(ranks(values[p], np.array([t]))[0]) * specs[p].rank for p, t in pairs]
    bad = np.zeros(len(values), np.bool_)
    asked = rank if any(spec.rank for spec in specs) else None
    return Reads(bad, top_id=top, top_logp=logp, top_rank=asked, parent=parent, score=score)

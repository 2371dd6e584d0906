"""A runner that computes nothing: every draw is the same token. For what does not depend on tokens, and for timing."""

from __future__ import annotations

import numpy as np

from pagefork.scheduler.plan import Kind, Plan, Probe, Reads, Result

FIRST_MERGED = 10  # the tokens of a merge are this one and those that follow it


class FakeRunner:
    """Draws `token` everywhere; the most probable tokens are 0, 1, 2, ...; merges choose parents at random."""

    def __init__(self, token: int = 7) -> None:
        self._token = token
        self._rng = np.random.default_rng(0)

    def submit(self, plan: Plan) -> None:
        self._result = Result(plan.step, [self._read(probe) for probe in plan.probes])

    def collect(self) -> Result:
        return self._result

    def _read(self, probe: Probe) -> Reads:
        count, n = len(probe.at), probe.n
        bad, zeros = np.zeros(count, np.bool_), np.zeros(count, np.float32)
        if probe.kind is Kind.SAMPLE:
            return Reads(bad, np.full(count, self._token, np.int32), zeros, np.ones(count, np.int32))
        if probe.kind is Kind.MERGE:
            return self._merge(probe, bad)
        top = np.tile(np.arange(n, dtype=np.int32), (count, 1))
        reads = Reads(bad, top_id=top, top_logp=-top.astype(np.float32), top_p=np.exp(-top.astype(np.float32)))
        if probe.processed:
            reads.top_rank = top + 1
        if probe.window is not None:
            reads.sim = self._rng.random(count, np.float32)
        return reads

    def _merge(self, probe: Probe, bad: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Reads:
        assert probe.groups is not None and probe.bias is not None
        first, size = probe.groups[:-1, None], np.diff(probe.groups)[:, None]
        parent = (first + self._rng.random((len(size), probe.n)) * size).astype(np.int32)
        logp = -1.0 - np.tile(np.arange(probe.n, dtype=np.float32) * 1e-3, (len(size), 1))
        best = np.maximum.reduceat(probe.bias, probe.groups[:-1])[:, None]
        token = np.tile(np.arange(FIRST_MERGED, FIRST_MERGED + probe.n, dtype=np.int32), (len(size), 1))
        score = (best + logp).astype(np.float32)
        return Reads(
            bad, top_id=token, top_logp=logp.astype(np.float32), top_rank=np.zeros_like(token), parent=parent, score=score
        )

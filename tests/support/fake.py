"""A runner that computes nothing: every draw is the same token. For what does not depend on tokens, and for timing."""

from __future__ import annotations

import numpy as np

from pagefork.scheduler.plan import Kind, Plan, Reads, Result


class FakeRunner:
    """Draws `token` everywhere; the most probable tokens are 0, 1, 2, ..."""

    def __init__(self, token: int = 7) -> None:
        self._token = token

    def submit(self, plan: Plan) -> None:
        self._result = Result(plan.step, [self._read(probe.kind, len(probe.at), probe.n) for probe in plan.probes])

    def collect(self) -> Result:
        return self._result

    def _read(self, kind: Kind, count: int, n: int) -> Reads:
        bad, zeros = np.zeros(count, np.bool_), np.zeros(count, np.float32)
        if kind is Kind.SAMPLE:
            return Reads(bad, np.full(count, self._token, np.int32), zeros, np.ones(count, np.int32))
        top = np.tile(np.arange(n, dtype=np.int32), (count, 1))
        return Reads(bad, top_id=top, top_logp=-top.astype(np.float32), top_p=np.exp(-top.astype(np.float32)))

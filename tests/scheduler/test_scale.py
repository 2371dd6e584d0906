"""Many sequences at once, on a runner that computes nothing."""

from __future__ import annotations

import numpy as np
from support.fake import FakeRunner

from pagefork.scheduler.params import SamplingParams
from pagefork.scheduler.plan import Spec
from pagefork.scheduler.request import Request
from pagefork.scheduler.scheduler import Scheduler


def request(name: str, length: int, params: SamplingParams, seed: int = 0) -> Request:
    prompt = np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)
    return Request(name, prompt, params, Spec(prompt_len=length), length + (params.max_tokens or 0))


def test_a_thousand_sequences_of_all_widths_run_and_leave_nothing() -> None:
    scheduler = Scheduler(9000, 16, max_num_seqs=1024, max_num_batched_tokens=2048)
    runner = FakeRunner()
    for i in range(300):
        scheduler.add(request(str(i), 20 + i, SamplingParams(n=1 + i % 7, max_tokens=1 + i % 40), seed=i))
    most = done = 0
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        assert plan is not None and len(plan.rows.tokens) <= 2048
        most = max(most, len(plan.rows.slot))
        runner.submit(plan)
        done += sum(update.done for update in scheduler.apply(runner.collect()))
    scheduler.check()
    assert done == 300 and most > 500
    assert scheduler.kv.pool.free == 8999 and len(scheduler.kv.table) == 0
    assert scheduler.counters.generated_tokens == sum((1 + i % 7) * (1 + i % 40) for i in range(300))


def test_a_group_of_512_holds_its_prompt_once() -> None:
    scheduler = Scheduler(2000, 16, max_num_seqs=512, max_num_batched_tokens=4096)
    runner = FakeRunner()
    scheduler.add(request("a", 2048, SamplingParams(n=512, max_tokens=8)))
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        runner.submit(plan)
        scheduler.apply(runner.collect())
    assert 1999 - scheduler.kv.pool.free == 2048 // 16 + 512
    scheduler.check()
    scheduler.abort("a")
    assert scheduler.kv.pool.free == 1999

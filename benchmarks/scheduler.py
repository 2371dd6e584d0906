"""What does scheduling cost? Microseconds per step and per admitted request, without a model.

    python benchmarks/scheduler.py [--out benchmarks/results/scheduler.json]

A runner that computes nothing stands in for the model, so all the time is the scheduler's: planning the step
and applying its results. Measured by pytest-benchmark; medians go to the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.fake import FakeRunner

from pagefork.scheduler.params import SamplingParams
from pagefork.scheduler.plan import Spec
from pagefork.scheduler.request import Request
from pagefork.scheduler.scheduler import Scheduler
from pagefork.scheduler.search_params import BeamSearchParams

COUNTS = [1, 16, 64, 256, 1024]


def request(name: str, prompt: np.ndarray[Any, np.dtype[np.int32]], n: int = 1, beams: int = 0) -> Request:
    """A request that samples `n` outputs, or searches with so many beams."""
    room = 1000 if beams else 100_000
    params = BeamSearchParams(beam_width=beams, max_tokens=room) if beams else SamplingParams(max_tokens=room, n=n)
    return Request(name, prompt, params, Spec(prompt_len=len(prompt)), len(prompt) + room)


def step(scheduler: Scheduler, runner: FakeRunner) -> None:
    plan = scheduler.schedule()
    assert plan is not None
    runner.submit(plan)
    scheduler.apply(runner.collect())


def running(count: int, n: int = 1, search: bool = False) -> tuple[Scheduler, FakeRunner]:
    """`count` sequences, `n` to a request, that decode; their prompts differ in length, as they do in service.

    They are samples, or the beams of searches whose every step keeps about half of the beams and forks the others from them.
    """
    scheduler = Scheduler(count * 200 + 1000, 16, max_num_seqs=max(256, count), max_num_batched_tokens=2048 + count)
    runner, rng = FakeRunner(), np.random.default_rng(0)
    for i in range(count // n):
        scheduler.add(request(str(i), rng.integers(0, 1000, 64 + i % 16).astype(np.int32), n, n if search else 0))
    while len(scheduler.residents.waiting):
        step(scheduler, runner)
    for _ in range(20):
        step(scheduler, runner)
    return scheduler, runner


@pytest.mark.parametrize("count", COUNTS)
def test_step(benchmark: Any, count: int) -> None:
    """One step of `count` decoding sequences, each a request of its own."""
    benchmark.pedantic(step, running(count), rounds=300, warmup_rounds=10)


def test_step_of_groups(benchmark: Any) -> None:
    """One step of 64 requests of 4 sequences."""
    benchmark.pedantic(step, running(256, 4), rounds=300, warmup_rounds=10)


@pytest.mark.parametrize(("groups", "width"), [(64, 4), (1, 4096)])
def test_step_of_searches(benchmark: Any, groups: int, width: int) -> None:
    """One step of searches of so many beams each; the largest time is that of a step in which all of them fill blocks."""
    benchmark.pedantic(step, running(groups * width, width, search=True), rounds=100, warmup_rounds=10)


@pytest.mark.parametrize("count", COUNTS)
def test_admission(benchmark: Any, count: int) -> None:
    """Admitting one request whose 1000-token prompt is cached, while `count` others wait to be admitted with it."""
    prompt = np.arange(1000, dtype=np.int32)
    runner = FakeRunner()
    scheduler = Scheduler(count * 70 + 1000, 16, max_num_seqs=1024, max_num_batched_tokens=64 * count + 2048)
    scheduler.add(request("first", prompt))
    for _ in range(2):
        step(scheduler, runner)
    scheduler.abort("first")

    def setup() -> None:
        for name in list(scheduler._by_id):
            scheduler.abort(name)
        for i in range(count):
            scheduler.add(request(str(i), prompt))

    def admit() -> None:
        scheduler.residents.choose()

    benchmark.pedantic(admit, setup=setup, rounds=20)


def waiting_memory() -> float:
    """Bytes that a waiting request of 1000 tokens takes, as a multiple of its token ids."""
    scheduler = Scheduler(1000)
    prompts = [np.arange(1000, dtype=np.int32) for _ in range(1000)]
    tracemalloc.start()
    for i, prompt in enumerate(prompts):
        scheduler.add(request(str(i), prompt.copy()))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / (1000 * 4000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scheduler.json"))
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile(suffix=".json") as raw:
        options = ["-q", "--benchmark-columns=min,median,max", f"--benchmark-json={raw.name}"]
        if code := pytest.main([__file__, *options]):
            raise SystemExit(code)
        found = json.loads(Path(raw.name).read_text())
    micros, worst = (
        {entry["name"].removeprefix("test_"): round(entry["stats"][stat] * 1e6, 1) for entry in found["benchmarks"]}
        for stat in ("median", "max")
    )
    per_request = {f"admission_each[{count}]": round(micros[f"admission[{count}]"] / count, 1) for count in COUNTS}
    report = {
        "machine": {"processor": found["machine_info"]["cpu"].get("brand_raw", platform.processor()), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": "python benchmarks/scheduler.py",
        "date": found["datetime"][:10],
        "median_microseconds": micros | per_request,
        "largest_microseconds": {name: value for name, value in worst.items() if name.startswith("step")},
        "waiting_request_bytes_per_token_id_byte": round(waiting_memory(), 2),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

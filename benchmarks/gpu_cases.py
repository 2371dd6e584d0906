"""What benchmarks/gpu_engine.py measures: an engine on random weights, against the limits of the device.

A row of the result says how long a step takes, or how many tokens come in a second, and what the device would allow: to
decode it must read the weights and the cached keys and values once, at the rate of a copy; to compute a prompt it must
multiply, at the rate of a large product in the same type. Both rates are measured in the same process.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gpu_bench import ROUNDS, Bench, Flow
from gpu_models import prompt_flops

from pagefork import BeamSearchParams, SamplingParams
from pagefork.runner import ModelRunner
from pagefork.scheduler.plan import Plan

Row = dict[str, Any]


@contextmanager
def no_trunks() -> Iterator[None]:
    """Plans do not say which rows share their first blocks, so that attention reads those for each."""
    submit = ModelRunner.submit

    def without(self: ModelRunner, plan: Plan) -> None:
        plan.rows.trunk = np.empty((0, 3), np.int32)
        submit(self, plan)

    ModelRunner.submit = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        ModelRunner.submit = submit  # type: ignore[method-assign]


def sampled(tokens: int, n: int = 1, seed: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.6, n=n, max_tokens=tokens, ignore_eos=True, seed=seed)


def decode(bench: Bench, batch: int, **settings: Any) -> Row:
    """Milliseconds of a step of `batch` sequences."""
    sizes = bench.sizes
    batch = min(batch, sizes.sequences)
    prompts = bench.prompts(batch, sizes.prompt)
    params = [sampled(sizes.length - sizes.prompt)] * batch
    flow = Flow(bench.engine(**settings), prompts, params)
    ms, context, host = flow.rounds(batch, sizes.warm, sizes.steps)
    flow.stop()
    return {"unit": "ms", "value": ms, "limit": bench.read_ms(context), "host_ms": host, "tokens_per_s": 1000 * batch / ms}


def prefill(bench: Bench, **settings: Any) -> Row:
    """Milliseconds until the first token of a long prompt, alone."""
    engine, params = bench.engine(**settings), [sampled(1)]
    times = [Flow(engine, bench.prompts(1, bench.sizes.prefix), params).finish() for _ in range(ROUNDS + 1)]
    limit = 1000 * prompt_flops(bench.config, bench.sizes.prefix) / bench.flops_per_s
    return {"unit": "ms", "value": 1000 * statistics.median(times[1:]), "limit": limit}


def mixed(bench: Bench, count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of random lengths, and how many tokens to generate for each; always the same."""
    draw = random.Random(0)
    lengths = [(draw.randint(*bench.sizes.load), draw.randint(*bench.sizes.load)) for _ in range(count)]
    return [bench.prompts(1, given)[0] for given, _ in lengths], [wanted for _, wanted in lengths]


def load(bench: Bench, count: int, **settings: Any) -> Row:
    """Output tokens per second of `count` requests that come at once, of random lengths, prompts included."""
    engine = bench.engine(**settings)
    prompts, wanted = mixed(bench, count)
    Flow(engine, prompts[:4], [sampled(2)] * min(4, count)).finish()
    seconds = Flow(engine, prompts, [sampled(tokens) for tokens in wanted]).finish()
    return {"unit": "tokens/s", "value": sum(wanted) / seconds, "limit": None, "requests": count, "tokens": sum(wanted)}


def group(bench: Bench, apart: bool = False, trunks: bool = True) -> Row:
    """Milliseconds of a step of 8 sequences behind one long prefix: outputs of one prompt, or of 8 prompts of their own."""
    sizes, outputs = bench.sizes, 8
    prompts = bench.prompts(1, sizes.prefix) * (outputs if apart else 1)
    params = [sampled(sizes.length - sizes.prefix, 1 if apart else outputs, seed=1)] * len(prompts)
    flow = Flow(bench.engine(), prompts, params)
    if trunks:
        ms, context, host = flow.rounds(outputs, sizes.warm, sizes.steps)
    else:
        with no_trunks():
            ms, context, host = flow.rounds(outputs, sizes.warm, sizes.steps)
    flow.stop()
    return {"unit": "ms", "value": ms, "limit": bench.read_ms(context), "host_ms": host}


def beam(bench: Bench, searches: int, width: int, **settings: Any) -> Row:
    """Tokens of the best outputs per second of beam searches that come at once."""
    sizes = bench.sizes
    engine = bench.engine(**settings)

    def run(tokens: int) -> float:
        params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
        return Flow(engine, bench.prompts(searches, sizes.beam_prompt), [params] * searches).finish()

    run(2)
    seconds = run(sizes.beam_tokens)
    return {"unit": "tokens/s", "value": searches * sizes.beam_tokens / seconds, "limit": None, "seconds": seconds}


def wide_beam(bench: Bench) -> Row:
    """One search of thousands of beams."""
    sizes, width = bench.sizes, bench.sizes.wide
    length = sizes.beam_prompt + sizes.beam_tokens + 64  # a little more than it needs, for blocks that are copied
    return beam(bench, 1, width, max_num_seqs=width, max_num_batched_tokens=max(width, sizes.budget), max_model_len=length)

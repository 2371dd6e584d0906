"""AsyncLLMEngine: its streams are those of the synchronous engine, however many there are and however they are read."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from support.serving import (
    GREEDY,
    PROMPTS,
    Gate,
    Outputs,
    alone,
    cancel_after_a_tick,
    config,
    found,
    idle,
    in_front_of_forward,
    read,
    running,
    until,
)

from pagefork import LLM, LLMEngine, RequestOutput, SamplingParams

KINDS = [
    GREEDY,
    SamplingParams(max_tokens=9, seed=1),
    SamplingParams(n=3, max_tokens=5, seed=2, top_p=0.9),
    SamplingParams(max_tokens=12, seed=3, frequency_penalty=0.5, stop=["("]),
    SamplingParams(max_tokens=3, seed=4, logprobs=2),
]


def test_streams_equal_the_outputs_of_the_synchronous_engine(demo: LLM) -> None:
    async def main() -> list[list[RequestOutput]]:
        async with running() as engine:
            return await asyncio.gather(*(read(engine, prompt, params) for prompt in PROMPTS for params in KINDS))

    streams = asyncio.run(main())
    for outputs, (prompt, params) in zip(streams, [(p, k) for p in PROMPTS for k in KINDS], strict=True):
        expected = demo.generate(prompt, params, use_tqdm=False)[0]
        assert found(outputs[-1]) == found(expected)
        assert [c.logprobs is None for c in outputs[-1].outputs] == [c.logprobs is None for c in expected.outputs]
        assert outputs[-1].prompt_token_ids == expected.prompt_token_ids and outputs[-1].prompt == prompt
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        for before, after in pairwise(outputs):
            for old, new in zip(before.outputs, after.outputs, strict=True):
                assert new.token_ids[: len(old.token_ids)] == old.token_ids


def test_requests_without_id_and_seed_draw_what_the_synchronous_engine_draws() -> None:
    params = SamplingParams(max_tokens=8)

    async def main() -> list[Outputs]:
        async with running() as engine:
            return [found((await read(engine, prompt, params))[-1]) for prompt in PROMPTS]

    fresh = LLM("demo", dtype="float32", num_blocks=120)
    assert asyncio.run(main()) == [alone(fresh, prompt, params) for prompt in PROMPTS]


def test_500_streams_of_which_100_are_cancelled_at_any_moment_leave_no_block_and_change_nobody(demo: LLM) -> None:
    cases = [(prompt, params) for prompt in PROMPTS for params in KINDS]
    expected = [alone(demo, prompt, params) for prompt, params in cases]
    chance = random.Random(0)
    victims = chance.sample(range(500), 100)
    doom = Counter(chance.randrange(1500) for _ in victims)
    seen = 0

    async def main() -> list[list[RequestOutput] | BaseException]:
        async with running() as engine:
            pool = victims.copy()

            async def follow(index: int) -> list[RequestOutput]:
                nonlocal seen
                outputs = []
                async for output in engine.generate(*cases[index % len(cases)]):
                    outputs.append(output)
                    for _ in range(doom[seen]):
                        tasks[pool.pop()].cancel()
                    seen += 1
                return outputs

            tasks = [asyncio.create_task(follow(index)) for index in range(500)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert not pool
            await idle(engine)
            return results

    results = asyncio.run(main())
    cancelled = {index for index, result in enumerate(results) if isinstance(result, asyncio.CancelledError)}
    assert cancelled <= set(victims) and len(cancelled) > 50
    for index in set(range(500)) - cancelled:
        outputs = results[index]
        assert isinstance(outputs, list), outputs
        assert found(outputs[-1]) == expected[index % len(cases)]


def test_a_slow_reader_skips_outputs_but_not_the_last(demo: LLM) -> None:
    async def main() -> list[RequestOutput]:
        async with running() as engine:
            outputs = []
            async for output in engine.generate("def f(", GREEDY):
                outputs.append(output)
                await until(engine, lambda stats: stats.num_running == 0)
            return outputs

    first, last = asyncio.run(main())
    assert not first.finished and last.finished
    assert found(last) == alone(demo, "def f(", GREEDY)


def test_a_blocked_loop_costs_outputs_and_not_memory(demo: LLM) -> None:
    async def main() -> None:
        async with running() as engine:
            steps = iter(range(1000))
            late = threading.Event()
            await in_front_of_forward(engine, lambda: late.set() if next(steps) == 40 else None)
            stream = engine.generate("def f(", GREEDY.replace(max_tokens=50))
            assert len((await anext(stream)).outputs[0].token_ids) < 40
            assert late.wait(30)
            assert len(engine._thread._box) == 1
            rest = [output async for output in stream]
            assert len(rest) <= 50 - 38
            assert found(rest[-1]) == alone(demo, "def f(", GREEDY.replace(max_tokens=50))

    asyncio.run(main())


def test_the_loop_is_woken_at_most_once_a_step_and_the_idle_engine_never_steps() -> None:
    async def main() -> None:
        async with running() as engine:
            loop: Any = asyncio.get_running_loop()
            original, woken, steps = loop.call_soon_threadsafe, Counter[str](), Counter[str]()

            def counting(callback: Callable[..., Any], *args: Any) -> Any:
                woken[callback.__name__] += 1
                return original(callback, *args)

            def count_steps(inner: Any) -> None:
                step = inner.step
                inner.step = lambda: steps.update(["step"]) or step()

            await engine._call(count_steps)
            loop.call_soon_threadsafe = counting
            await asyncio.gather(*(read(engine, prompt, GREEDY) for prompt in PROMPTS * 6))
            loop.call_soon_threadsafe = original
            assert 6 <= woken["_deliver"] <= steps["step"] < 30
            count = steps["step"]
            await asyncio.sleep(0.05)
            assert steps["step"] == count

    asyncio.run(main())


def test_the_loop_runs_while_a_step_is_computed() -> None:
    async def main() -> None:
        async with running() as engine:
            gate = Gate()
            await in_front_of_forward(engine, gate)
            task = asyncio.create_task(read(engine))
            await gate.arrival()
            for _ in range(1000):
                await asyncio.sleep(0)
            assert not task.done()
            gate.open.set()
            assert len((await task)[-1].outputs[0].token_ids) == 6

    asyncio.run(main())


def test_facts_are_those_of_the_synchronous_engine() -> None:
    inner = LLMEngine(config())

    async def main() -> None:
        async with running() as engine:
            assert await engine.info() == inner.info()
            assert await engine.stats() == inner.stats()
            assert await engine.default_params() == inner.default_params()
            assert engine.max_model_len == inner.max_model_len
            assert engine.tokenizer and inner.tokenizer
            assert engine.tokenizer.encode("def f(") == inner.tokenizer.encode("def f(")
            outputs = await read(engine, "def f(", None)
            assert len(outputs[-1].outputs[0].token_ids) <= (inner.default_params().max_tokens or 1024)
            await cancel_after_a_tick(engine.stats())

    asyncio.run(main())

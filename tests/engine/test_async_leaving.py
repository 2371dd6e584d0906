"""AsyncLLMEngine: readers that leave, aborts and bad requests harm nobody else and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from support.serving import GREEDY, LONG, Gate, alone, cancel, found, idle, in_front_of_forward, read, running, until

from pagefork import LLM, AsyncLLMEngine, InvalidRequestError, SamplingParams


async def _leave_before_the_first_tick(engine: AsyncLLMEngine) -> None:
    await cancel(asyncio.create_task(read(engine, params=LONG)))


async def _leave_in_the_queue(engine: AsyncLLMEngine) -> None:
    gate = Gate()
    await in_front_of_forward(engine, gate)
    first = asyncio.create_task(read(engine))
    await gate.arrival()  # the thread is inside a step, so the next command waits
    second = asyncio.create_task(read(engine, params=LONG))
    await asyncio.sleep(0)
    await cancel(second)
    gate.open.set()
    await first


async def _leave_while_waiting(engine: AsyncLLMEngine) -> None:
    tasks = [asyncio.create_task(read(engine, params=LONG)) for _ in range(5)]
    await until(engine, lambda stats: stats.num_waiting > 0)
    for task in reversed(tasks):
        await cancel(task)


async def _leave_in_prefill(engine: AsyncLLMEngine) -> None:
    task = asyncio.create_task(read(engine, [7] * 900, LONG))
    await until(engine, lambda stats: stats.forward_tokens > 0)
    await cancel(task)
    assert (await engine.stats()).forward_tokens < 900


async def _leave_in_decode(engine: AsyncLLMEngine) -> None:
    async def reader() -> None:
        async for output in engine.generate("def f(", LONG):
            if len(output.outputs[0].token_ids) > 2:
                decoding.set()

    decoding = asyncio.Event()
    task = asyncio.create_task(reader())
    await decoding.wait()
    await cancel(task)
    assert (await engine.stats()).generated_tokens < 400


async def _leave_after_the_last_token(engine: AsyncLLMEngine) -> None:
    async def reader() -> None:
        async for output in engine.generate("def f(", GREEDY):
            if output.finished:
                finished.set()
                await asyncio.sleep(60)

    finished = asyncio.Event()
    task = asyncio.create_task(reader())
    await finished.wait()
    await cancel(task)


async def _leave_by_break(engine: AsyncLLMEngine) -> None:
    async for _ in engine.generate("def f(", LONG):
        break
    gc.collect()
    await until(engine, lambda stats: stats.num_running == 0)


async def _leave_by_aclose(engine: AsyncLLMEngine) -> None:
    async with aclosing(engine.generate("def f(", LONG)) as stream:
        await anext(stream)


async def _leave_by_an_exception(engine: AsyncLLMEngine) -> None:
    async def reader() -> None:
        async for _ in engine.generate("def f(", LONG):
            raise KeyError

    with pytest.raises(KeyError):
        await asyncio.create_task(reader())
    gc.collect()
    await until(engine, lambda stats: stats.num_running == 0)


@pytest.mark.parametrize(
    "leave",
    [
        _leave_before_the_first_tick,
        _leave_in_the_queue,
        _leave_while_waiting,
        _leave_in_prefill,
        _leave_in_decode,
        _leave_after_the_last_token,
        _leave_by_break,
        _leave_by_aclose,
        _leave_by_an_exception,
    ],
)
def test_a_reader_that_leaves_aborts_its_request_and_frees_its_blocks(leave: Callable[[AsyncLLMEngine], Any], demo: LLM) -> None:
    async def main() -> None:
        async with running(max_num_seqs=4, max_num_batched_tokens=16) as engine:
            await leave(engine)
            await idle(engine)
            assert found((await read(engine))[-1]) == alone(demo, "def f(", GREEDY)

    asyncio.run(main())


def test_abort_ends_a_stream_with_what_there_was_and_frees_its_id() -> None:
    async def main() -> None:
        async with running(max_num_seqs=1) as engine:
            stream = engine.generate("def f(", LONG, request_id="a")
            await anext(stream)
            waiting = asyncio.create_task(read(engine, request_id="b"))
            await until(engine, lambda stats: stats.num_waiting == 1)
            await asyncio.gather(engine.abort("b"), engine.abort("b"), engine.abort("nobody"))
            await engine.abort("a")
            again = asyncio.create_task(read(engine, request_id="a"))
            [last] = [output async for output in stream]
            assert last.finished and last.outputs[0].finish_reason == "abort" and last.outputs[0].token_ids
            [last] = await waiting
            assert last.finished and last.outputs[0].finish_reason == "abort" and not last.outputs[0].token_ids
            assert len((await again)[-1].outputs[0].token_ids) == 6

    asyncio.run(main())


def test_an_id_that_is_used_again_at_once_has_nothing_to_do_with_its_first_request() -> None:
    async def main() -> None:
        async with running() as engine:
            first = engine.generate("def f(", LONG, request_id="a")
            await anext(first)
            while not engine._thread._box:
                time.sleep(0.001)  # an output of the first is on its way when the loop goes on
            await first.aclose()
            again = engine.generate("import os\n", LONG, request_id="a")
            outputs = [await anext(again)]
            await engine.abort("a")
            outputs += [output async for output in again]
            assert {output.prompt for output in outputs} == {"import os\n"}
            assert outputs[-1].outputs[0].finish_reason == "abort"

    asyncio.run(main())


class Bomb:
    """A prompt that raises what no prompt should."""

    def __len__(self) -> int:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("prompt", "params", "options", "error"),
    [
        ([], GREEDY, {}, InvalidRequestError),
        ([9999], GREEDY, {}, InvalidRequestError),
        ([1] * 5000, GREEDY, {}, InvalidRequestError),
        (None, GREEDY, {}, InvalidRequestError),
        ("x", "greedy", {}, InvalidRequestError),
        ("x", SamplingParams(n=33), {}, InvalidRequestError),
        ("x", GREEDY, {"request_id": "taken"}, InvalidRequestError),
        ("x", GREEDY, {"request_id": ""}, InvalidRequestError),
        ("x", GREEDY, {"request_id": []}, InvalidRequestError),
        ("x", GREEDY, {"priority": "high"}, InvalidRequestError),
        (["x", Bomb()], GREEDY, {}, InvalidRequestError),
        ([Bomb()], GREEDY, {}, Exception),
    ],
)
def test_a_bad_request_is_refused_by_its_first_output_and_nobody_else_notices(
    prompt: Any, params: Any, options: dict[str, Any], error: type[Exception], demo: LLM
) -> None:
    async def main() -> None:
        async with running() as engine:
            neighbour = engine.generate("def f(", GREEDY, request_id="taken")
            await anext(neighbour)
            with pytest.raises(error):
                await anext(engine.generate(prompt, params, **options))
            assert found([output async for output in neighbour][-1]) == alone(demo, "def f(", GREEDY)

    asyncio.run(main())


def test_a_prompt_is_read_when_it_is_given() -> None:
    async def main() -> None:
        async with running() as engine:
            gate, prompt = Gate(), [5, 6, 7]
            await in_front_of_forward(engine, gate)
            first = asyncio.create_task(read(engine))
            await gate.arrival()
            second = asyncio.create_task(read(engine, prompt))
            await asyncio.sleep(0)
            prompt.clear()
            gate.open.set()
            await first
            assert (await second)[-1].prompt_token_ids == [5, 6, 7]

    asyncio.run(main())

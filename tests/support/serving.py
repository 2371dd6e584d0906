"""An AsyncLLMEngine on the demo model, and what its tests do to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from torch import Tensor

from pagefork import LLM, AsyncLLMEngine, EngineConfig, LLMEngine, PageforkError, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = GREEDY.replace(max_tokens=400)
PROMPTS = ["def f(", "import os\n", "class Queue:\n    def", "for x in range(", 'print("' * 9]
Outputs = list[tuple[list[int], str, str | None]]


def config(**settings: Any) -> EngineConfig:
    usual: dict[str, Any] = {"model": "demo", "dtype": "float32", "num_blocks": 120, "max_num_seqs": 32}
    return EngineConfig(**usual | settings)


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[AsyncLLMEngine]:
    """A started engine that holds no block at the end and leaves no thread."""
    threads = threading.active_count()
    async with AsyncLLMEngine(config(**settings)) as engine:
        yield engine
        if engine.is_running:
            await idle(engine)
    assert threading.active_count() == threads
    assert not engine._streams and not engine._calls


async def idle(engine: AsyncLLMEngine) -> None:
    await engine.check()
    stats = await engine.stats()
    assert (stats.free_blocks, stats.num_running, stats.num_waiting) == (stats.num_blocks, 0, 0)


async def read(engine: AsyncLLMEngine, prompt: Any = "def f(", params: Any = GREEDY, **options: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


async def read_to_the_error(stream: AsyncIterator[RequestOutput]) -> tuple[list[RequestOutput], PageforkError]:
    outputs = []
    try:
        async for output in stream:
            outputs.append(output)  # noqa: PERF401 - a comprehension would lose them
    except PageforkError as error:
        return outputs, error
    raise AssertionError("the stream ended without an error")


async def until(engine: AsyncLLMEngine, reached: Callable[[Any], bool]) -> None:
    while not reached(await engine.stats()):
        await asyncio.sleep(0)


def found(output: RequestOutput) -> Outputs:
    return [(completion.token_ids, completion.text, completion.finish_reason) for completion in output.outputs]


def alone(demo: LLM, prompt: str, params: SamplingParams) -> Outputs:
    return found(demo.generate(prompt, params, use_tqdm=False)[0])


async def in_front_of_forward(engine: AsyncLLMEngine, act: Callable[[], None]) -> None:
    """From now on `act` is called in the engine's thread before every forward pass."""

    def replace(inner: LLMEngine) -> None:
        model: Any = inner._runner._model
        forward = model.forward

        def acting(*args: Any) -> Tensor:
            act()
            result: Tensor = forward(*args)
            return result

        model.forward = acting

    await engine._call(replace)


class Gate:
    """Holds every forward pass until it is opened; `reached` is set when one waits."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(30), "nobody opened the gate: the loop hangs"

    async def arrival(self) -> None:
        async with asyncio.timeout(30):
            while not self.reached.is_set():
                await asyncio.sleep(0)


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_after_a_tick(awaitable: Any) -> None:
    task = asyncio.create_task(awaitable)
    await asyncio.sleep(0)
    await cancel(task)

"""AsyncLLMEngine: how it starts, fails and ends."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from support.serving import (
    GREEDY,
    LONG,
    Gate,
    alone,
    cancel_after_a_tick,
    config,
    found,
    idle,
    in_front_of_forward,
    read,
    read_to_the_error,
    running,
    until,
)

from pagefork import (
    LLM,
    AsyncLLMEngine,
    ConfigError,
    EngineConfig,
    EngineDeadError,
    EngineMisuseError,
    LLMEngine,
    ModelError,
    StepFailedError,
)


def test_a_failing_step_ends_its_streams_with_the_cause_and_the_engine_goes_on(demo: LLM) -> None:
    async def main() -> None:
        async with running(max_num_seqs=2) as engine:
            state = {"broken": False}

            def fail_once() -> None:
                if state["broken"]:
                    state["broken"] = False
                    raise MemoryError("none left")

            await in_front_of_forward(engine, fail_once)
            streams = [engine.generate("def f(", LONG) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            spared = asyncio.create_task(read(engine))
            await until(engine, lambda stats: stats.num_waiting == 1)
            state["broken"] = True
            for stream in streams:
                outputs, error = await read_to_the_error(stream)
                assert isinstance(error, StepFailedError) and isinstance(error.__cause__, MemoryError)
                assert outputs[-1].finished and outputs[-1].error is error
                assert outputs[-1].outputs[0].finish_reason == "error" and outputs[-1].outputs[0].token_ids
            assert found((await spared)[-1]) == alone(demo, "def f(", GREEDY)
            assert engine.is_running

    asyncio.run(main())


def test_an_engine_that_fails_ends_every_stream_and_call_with_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running(max_num_seqs=1) as engine:
            gate = Gate()
            streams = [engine.generate("def f(", LONG) for _ in range(3)]
            await anext(streams[0])
            await in_front_of_forward(engine, gate)
            await gate.arrival()

            def wreck(inner: Any) -> None:
                def schedule() -> None:
                    raise ZeroDivisionError("a bug")

                inner._scheduler.schedule = schedule

            waiting: list[Any] = [anext(stream) for stream in streams[1:]]
            waiting += [engine._call(wreck), read(engine)]
            tasks = [asyncio.create_task(one) for one in waiting]
            await asyncio.sleep(0)
            gate.open.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert results.pop(2) is None
            with pytest.raises(EngineDeadError):
                [output async for output in streams[0]]
            assert not engine.is_running
            for later in [read(engine), engine.stats(), engine.check(), engine.abort("0"), engine.info()]:
                results += await asyncio.gather(later, return_exceptions=True)
            assert len(results) == 8
            for result in results:
                assert isinstance(result, EngineDeadError) and isinstance(result.__cause__, ZeroDivisionError), result
            await engine.shutdown()

    asyncio.run(main())
    assert "the engine failed" in caplog.text and "a bug" in caplog.text


def test_what_an_engine_found_before_it_failed_is_still_delivered() -> None:
    async def main() -> None:
        async with running() as engine:
            stream = engine.generate("def f(", LONG)
            await anext(stream)

            def wreck(inner: LLMEngine) -> None:
                raise SystemExit("not an Exception")

            engine._thread._queue.put(wreck)
            with pytest.raises(EngineDeadError, match="SystemExit"):
                await engine.stats()  # it was asked before the loop knew
            outputs, error = await read_to_the_error(stream)
            assert isinstance(error, EngineDeadError) and isinstance(error.__cause__, SystemExit)
            assert len(outputs) <= 1 and not any(output.finished for output in outputs)

    asyncio.run(main())


def test_shutdown_lets_requests_finish_or_aborts_them_and_accepts_no_others() -> None:
    async def main() -> None:
        for drain, reason, tokens in [(None, "length", 6), (60, "length", 6), (0, "abort", 1)]:
            engine, gate = AsyncLLMEngine(config()), Gate()
            await engine.start()
            stream = engine.generate("def f(", GREEDY)
            await in_front_of_forward(engine, gate)
            reading = asyncio.create_task(anext(stream))
            await gate.arrival()
            ending = asyncio.create_task(engine.shutdown(drain))
            await asyncio.sleep(0)
            assert not engine.is_running
            with pytest.raises(EngineDeadError, match="shut down"):
                await read(engine)
            gate.open.set()
            await ending
            last = [await reading, *[output async for output in stream]][-1]
            assert last.finished and last.outputs[0].finish_reason == reason and len(last.outputs[0].token_ids) == tokens
            await engine.shutdown()
            for call in [read(engine), engine.stats(), engine.abort("0")]:
                with pytest.raises(EngineDeadError, match="shut down"):
                    await call

    threads = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == threads


def test_a_second_shutdown_hastens_the_first_and_a_cancelled_one_goes_on() -> None:
    async def main() -> None:
        async with running() as engine:
            stream = engine.generate("def f(", LONG)
            await anext(stream)
            await cancel_after_a_tick(engine.shutdown(None))
            slow = asyncio.create_task(engine.shutdown(600))
            await asyncio.sleep(0)
            await engine.stats()
            await engine.shutdown()
            await slow
            assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_shutdown_and_cancellation_while_loading_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def slow(config: EngineConfig, *others: Any) -> LLMEngine:
        gate()
        return LLMEngine(config, *others)

    monkeypatch.setattr("pagefork.engine_thread.LLMEngine", slow)
    threads = threading.active_count()

    async def main() -> None:
        engine = AsyncLLMEngine(config())
        starting = asyncio.create_task(engine.start())
        await gate.arrival()
        with pytest.raises(EngineMisuseError, match="not started"):
            await read(engine)
        ending = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0)
        gate.open.set()
        with pytest.raises(EngineDeadError, match="shut down"):
            await starting
        await ending
        gate.open.clear()
        engine = AsyncLLMEngine(config())
        await cancel_after_a_tick(engine.start())
        gate.open.set()
        await asyncio.wait_for(engine._ended, 30)

    asyncio.run(main())
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"model": "/nowhere/at/all"}, ModelError),
        ({"max_model_len": 10**6}, ConfigError),
        ({"num_blocks": 2**31 - 2}, ConfigError),
    ],
)
def test_an_error_of_loading_is_raised_by_start(settings: dict[str, Any], error: type[Exception]) -> None:
    async def main() -> None:
        engine = AsyncLLMEngine(config(**settings))
        with pytest.raises(error) as caught:
            await engine.start()
        assert not isinstance(caught.value, EngineDeadError) and not engine.is_running
        with pytest.raises(EngineDeadError) as later:
            await read(engine)
        assert later.value.__cause__ is caught.value
        await engine.shutdown()

    threads = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == threads


def test_an_engine_starts_once_in_one_loop() -> None:
    async def fresh() -> None:
        engine = AsyncLLMEngine(config())
        with pytest.raises(EngineMisuseError, match="not started"):
            await anext(engine.generate("x"))
        await engine.shutdown()
        with pytest.raises(EngineMisuseError, match="starts once"):
            await engine.start()

    async def refused(call: Any, match: str) -> None:
        with pytest.raises(EngineMisuseError, match=match):
            await call

    asyncio.run(fresh())
    engine = AsyncLLMEngine(config())
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        runner.run(refused(engine.start(), "starts once"))
        for call in [read(engine), engine.stats(), engine.abort("0"), engine.shutdown()]:
            asyncio.run(refused(call, "event loop that started it"))
        runner.run(refused(engine.shutdown(-1), "drain=-1"))
        runner.run(idle(engine))
        runner.run(engine.shutdown())


def test_an_engine_that_outlives_its_loop_can_be_shut_down_from_another() -> None:
    async def begin() -> AsyncLLMEngine:
        engine = AsyncLLMEngine(config())
        await engine.start()
        await read(engine)
        return engine

    before = threading.active_count()
    engine = asyncio.run(begin())
    assert threading.active_count() > before
    asyncio.run(engine.shutdown())
    assert threading.active_count() == before and not engine.is_running
    asyncio.run(engine.shutdown())


def test_shutdown_and_failure_free_the_model() -> None:
    async def main(fail: bool) -> weakref.ref[Any]:
        async with running() as engine:
            cache: weakref.ref[Any] = await engine._call(lambda inner: weakref.ref(inner._built.cache))
            await read(engine)
            if fail:
                engine._thread._queue.put(lambda inner: inner._scheduler.apply(None))  # type: ignore[arg-type]
                await engine._ended
        gc.collect()
        assert cache() is None
        return cache

    asyncio.run(main(fail=False))
    asyncio.run(main(fail=True))


ABANDONED = """
import asyncio, atexit
atexit.register(lambda: print([engine._thread._thread.is_alive() for engine in engines]))  # registered first, called last
from pagefork import AsyncLLMEngine, EngineConfig, SamplingParams

engines = loading, idle, busy = [AsyncLLMEngine(EngineConfig(model="demo", num_blocks=100)) for _ in range(3)]

async def main():
    await idle.start()
    await busy.start()
    stream = busy.generate("x", SamplingParams(max_tokens=900, ignore_eos=True))
    await anext(stream)
    starting = asyncio.create_task(loading.start())
    await asyncio.sleep(0)
    print("leaving")

asyncio.run(main())
"""


def test_a_program_that_forgets_to_shut_down_ends_nevertheless(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", ABANDONED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n[False, False, False]\n", "")

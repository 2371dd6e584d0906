"""Value functions in threads: whatever they do ends their own request at most, and nobody waits for them in vain."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.serving import GREEDY, found, idle, read, running

from pagefork import (
    EngineConfig,
    Leaf,
    LLMEngine,
    MCTSParams,
    ParameterError,
    RequestOutput,
    SamplingParams,
    ValueFunctionError,
)
from pagefork.asking import Answer, Asking
from pagefork.scheduler.strategies.base import Ask

SEARCH = MCTSParams(max_tokens=3, num_simulations=8, leaf_batch_size=4, top_k=4, c_puct=20.0, temperature=5.0, ignore_eos=True)
NEIGHBOURS = {"greedy": GREEDY, "drawn": SamplingParams(max_tokens=12, n=2, seed=1), "searched": SEARCH}


def liking(leaves: list[Leaf]) -> list[float]:
    """Values that every kind of number can hold."""
    return [float(5 * len(leaf.text) % 8) for leaf in leaves]


def raising(error: BaseException) -> Callable[[list[Leaf]], list[float]]:
    def function(leaves: list[Leaf]) -> list[float]:
        raise error

    return function


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


BAD: dict[str, tuple[Any, str]] = {
    "raises": (raising(ZeroDivisionError("by nothing")), "raised ZeroDivisionError: by nothing"),
    "exits": (raising(SystemExit(3)), "raised SystemExit: 3"),
    "interrupts": (raising(KeyboardInterrupt()), "raised KeyboardInterrupt"),
    "raises what has no text": (raising(Unspeakable()), "raised Unspeakable"),
    "NaN": (lambda leaves: [math.nan] * len(leaves), "returned nan at index 0"),
    "infinite": (lambda leaves: [0.0] * (len(leaves) - 1) + [-math.inf], "returned -inf at index 0"),
    "too few": (lambda leaves: [], "returned 0 values for 1 items"),
    "too many": (lambda leaves: [0.0] * (len(leaves) + 1), "returned more values for 1 items"),
    "endless": (lambda leaves: iter(int, 1), "returned more values for 1 items"),
    "one number": (lambda leaves: 0.5, "returned float instead of a list"),
    "nothing": (lambda leaves: None, "returned NoneType instead of a list"),
    "a text": (lambda leaves: "0", "returned str instead of a list"),
    "a dict": (lambda leaves: dict.fromkeys(range(len(leaves)), 0.0), "returned dict instead of a list"),
    "texts": (lambda leaves: ["0.5"] * len(leaves), "returned str at index 0"),
    "complex": (lambda leaves: [1j] * len(leaves), "returned complex at index 0"),
    "columns": (lambda leaves: torch.zeros(len(leaves), 1), "returned list at index 0"),
    "huge": (lambda leaves: [10**400] * len(leaves), "returned int at index 0"),
    "takes no argument": (threading.current_thread, "raised TypeError"),
}
GOOD: dict[str, Callable[[list[float]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda values: (value for value in values),
    "array": np.array,
    "array of integers": lambda values: np.array(values, np.int32),
    "numpy scalars": lambda values: [np.float32(value) for value in values],
    "fractions": lambda values: [Fraction(value) for value in values],
    "tensor": torch.tensor,
    "tensor with a gradient": lambda values: torch.tensor(values, requires_grad=True),
    "bfloat16": lambda values: torch.tensor(values, dtype=torch.bfloat16),
    "scalar tensors": lambda values: list(torch.tensor(values)),
}


class Gate:
    """A value function that answers when it is opened."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value
        self.reached, self.open = threading.Event(), threading.Event()
        self.thread: threading.Thread

    def __call__(self, leaves: list[Leaf]) -> list[float]:
        self.thread = threading.current_thread()
        self.reached.set()
        assert self.open.wait(30), "nobody opened the gate"
        return [self.value] * len(leaves)

    async def arrival(self) -> None:
        async with asyncio.timeout(30):
            while not self.reached.is_set():
                await asyncio.sleep(0.001)

    def release(self) -> None:
        self.open.set()
        if self.reached.is_set():
            self.thread.join(30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.release()


@pytest.fixture(scope="module")
def shared_engine() -> LLMEngine:
    return LLMEngine(EngineConfig(model="demo", dtype="float32", num_blocks=200, max_num_seqs=16))


@pytest.fixture
def engine(shared_engine: LLMEngine) -> Iterator[LLMEngine]:
    yield shared_engine
    assert not shared_engine.has_unfinished_requests()
    shared_engine.check()
    stats = shared_engine.stats()
    assert stats.free_blocks == stats.num_blocks and not stats.num_running and not stats.num_waiting
    assert not shared_engine._asking._calls and not shared_engine._processors


def finish(engine: LLMEngine) -> dict[str, RequestOutput]:
    done = {}
    while engine.has_unfinished_requests():
        done.update({output.request_id: output for output in engine.step() if output.finished})
    return done


def complete(engine: LLMEngine, **requests: Any) -> dict[str, RequestOutput]:
    for name, params in requests.items():
        engine.add_request(name, "def f(", params)
    return finish(engine)


def until_reached(engine: LLMEngine, gate: Gate) -> None:
    while not gate.reached.is_set():
        assert engine.has_unfinished_requests()
        engine.step()


@pytest.fixture(scope="module")
def alone(shared_engine: LLMEngine) -> dict[str, Any]:
    return {name: found(complete(shared_engine, **{name: params})[name]) for name, params in NEIGHBOURS.items()}


def test_value_functions_that_fail_end_their_requests_alone(engine: LLMEngine, alone: dict[str, Any]) -> None:
    done = complete(engine, **{kind: SEARCH.replace(value_fn=function) for kind, (function, _) in BAD.items()}, **NEIGHBOURS)
    for kind, (_, message) in BAD.items():
        error = done[kind].error
        assert isinstance(error, ValueFunctionError), kind
        assert f"the value function of request {kind!r} {message}" in str(error)
        assert done[kind].outputs[0].finish_reason == "error"
    assert {name: found(done[name]) for name in NEIGHBOURS} == alone


def test_the_error_of_a_value_function_is_the_cause(engine: LLMEngine) -> None:
    error = ZeroDivisionError("by nothing")
    assert complete(engine, a=SEARCH.replace(value_fn=raising(error)))["a"].error.__cause__ is error  # type: ignore[union-attr]


def test_a_value_function_may_fail_at_any_call(engine: LLMEngine, alone: dict[str, Any]) -> None:
    calls = Counter[str]()

    def function(leaves: list[Leaf]) -> list[float]:
        calls["all"] += 1
        return liking(leaves) if calls["all"] < 10 else []

    done = complete(engine, bad=SEARCH.replace(value_fn=function, max_tokens=20), **NEIGHBOURS)
    assert calls["all"] == 10
    assert isinstance(done["bad"].error, ValueFunctionError)
    assert 0 < len(done["bad"].outputs[0].token_ids) < 20
    assert {name: found(done[name]) for name in NEIGHBOURS} == alone


def test_numbers_of_any_kind_are_taken(engine: LLMEngine) -> None:
    def taking(form: Callable[[list[float]], Any]) -> MCTSParams:
        return SEARCH.replace(value_fn=lambda leaves: form(liking(leaves)))

    expected = complete(engine, a=taking(list))["a"]
    done = complete(engine, **{name: taking(form) for name, form in GOOD.items()})
    assert expected.error is None
    assert {name: found(done[name]) for name in GOOD} == dict.fromkeys(GOOD, found(expected))


def test_a_value_function_that_hangs_ends_its_request_at_the_deadline(
    engine: LLMEngine, alone: dict[str, Any], gate: Gate
) -> None:
    done = complete(engine, bad=SEARCH.replace(value_fn=gate, value_timeout=0.2), **NEIGHBOURS)
    assert not gate.open.is_set()
    assert isinstance(done["bad"].error, ValueFunctionError)
    assert "gave no answer within 0.2 seconds" in str(done["bad"].error) and "value_timeout" in str(done["bad"].error)
    assert {name: found(done[name]) for name in NEIGHBOURS} == alone
    assert complete(engine, bad=SEARCH.replace(value_fn=liking))["bad"].error is None


def test_others_run_on_while_a_value_function_computes(engine: LLMEngine, alone: dict[str, Any], gate: Gate) -> None:
    engine.add_request("asks", "def f(", SEARCH.replace(value_fn=gate))
    until_reached(engine, gate)
    for name, params in NEIGHBOURS.items():
        engine.add_request(name, "def f(", params)
    done: dict[str, RequestOutput] = {}
    while len(done) < len(NEIGHBOURS):
        done.update({output.request_id: output for output in engine.step() if output.finished})
    assert {name: found(done[name]) for name in NEIGHBOURS} == alone
    gate.release()
    assert finish(engine)["asks"].error is None


def test_a_request_can_be_aborted_while_its_value_function_computes(engine: LLMEngine, gate: Gate) -> None:
    engine.add_request("a", "def f(", SEARCH.replace(value_fn=gate))
    until_reached(engine, gate)
    engine.abort_request("a")
    [output] = engine.step()
    assert output.finished and output.outputs[0].finish_reason == "abort" and output.error is None
    assert not engine.has_unfinished_requests()
    gate.release()
    assert engine.step() == []


def test_an_answer_that_comes_too_late_is_not_for_a_later_request_of_the_same_name(engine: LLMEngine, gate: Gate) -> None:
    late = Gate(math.nan)
    engine.add_request("a", "def f(", SEARCH.replace(value_fn=late))
    until_reached(engine, late)
    engine.discard(["a"])
    engine.add_request("a", "def f(", SEARCH.replace(value_fn=gate))
    until_reached(engine, gate)
    late.release()
    assert engine.step() == engine.step() == []
    gate.release()
    assert finish(engine)["a"].error is None


def test_the_deadline_of_a_request_that_was_aborted_does_not_end_a_later_one_of_the_same_name(
    engine: LLMEngine, gate: Gate
) -> None:
    engine.add_request("a", "def f(", SEARCH.replace(value_fn=gate, value_timeout=0.2))
    until_reached(engine, gate)
    engine.discard(["a"])
    engine.add_request("a", "def f(", GREEDY)
    time.sleep(0.25)
    assert finish(engine)["a"].error is None


def test_a_step_that_fails_spares_a_request_whose_value_function_computes(engine: LLMEngine, gate: Gate) -> None:
    engine.add_request("asks", "def f(", SEARCH.replace(value_fn=gate))
    until_reached(engine, gate)
    engine.add_request("computes", "def f(", GREEDY)
    model: Any = engine._runner._model
    forward = model.forward
    model.forward = raising(MemoryError())
    [output] = engine.step()
    model.forward = forward
    assert output.request_id == "computes" and output.error is not None
    gate.release()
    assert finish(engine)["asks"].error is None


def test_the_engine_waits_for_a_value_function_and_does_not_spin(engine: LLMEngine) -> None:
    """An engine that spins takes tens of thousands of steps in this time."""
    once = SEARCH.replace(max_tokens=1, num_simulations=1, value_fn=lambda leaves: (time.sleep(0.5), liking(leaves))[1])
    engine.add_request("a", "def f(", once)
    steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
    assert 10 < steps < 200


def test_outputs_come_only_when_something_is_new(engine: LLMEngine) -> None:
    engine.add_request("a", "def f(", SEARCH.replace(value_fn=liking))
    steps, counts = 0, []
    while engine.has_unfinished_requests():
        counts += [len(output.outputs[0].token_ids) for output in engine.step()]
        steps += 1
    assert counts == sorted(set(counts)) and counts[-1] == 3
    assert steps > len(counts)


def test_a_value_function_sees_the_text_of_what_it_judges(engine: LLMEngine) -> None:
    seen: list[Leaf] = []
    complete(
        engine, a=SEARCH.replace(value_fn=lambda leaves: (seen.extend(leaves), liking(leaves))[1], skip_special_tokens=False)
    )
    assert engine.tokenizer is not None
    assert len(seen) > 8
    for leaf in seen:
        assert leaf.text == engine.tokenizer.decode(leaf.token_ids, skip_special_tokens=False)
        assert leaf.prompt_token_ids == engine.tokenizer.encode("def f(")


def test_a_tokenizer_decodes_the_same_in_many_threads(engine: LLMEngine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("def überall(x):\n    return '€' * x\n" * 5)
    expected = [tokenizer.decode(ids[i:]) for i in range(len(ids))]
    results: list[Any] = [None] * 8

    def work(index: int) -> None:
        results[index] = [tokenizer.decode(ids[i:]) for i in range(len(ids))] if index % 2 else tokenizer.encode(expected[0])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [ids, expected] * 4


def test_an_async_engine_obeys_while_all_of_its_requests_wait(gate: Gate) -> None:
    async def main() -> None:
        async with running() as engine:
            steps = Counter[str]()

            def count_steps(inner: Any) -> None:
                step = inner.step
                inner.step = lambda: steps.update(["step"]) or step()

            await engine._call(count_steps)
            task = asyncio.create_task(read(engine, params=SEARCH.replace(value_fn=gate), request_id="a"))
            await gate.arrival()
            before = steps["step"]
            await asyncio.sleep(0.3)
            assert steps["step"] - before < 100
            assert (await engine.stats()).num_running == 1
            assert len((await read(engine))[-1].outputs[0].token_ids) == 6
            await asyncio.wait_for(engine.abort("a"), 20)
            assert (await task)[-1].outputs[0].finish_reason == "abort"
            assert not gate.open.is_set()
            await idle(engine)
            gate.release()

    asyncio.run(main())


def test_a_reader_that_leaves_ends_a_request_whose_value_function_computes(gate: Gate) -> None:
    async def main() -> None:
        async with running() as engine:
            task = asyncio.create_task(read(engine, params=SEARCH.replace(value_fn=gate)))
            await gate.arrival()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await idle(engine)
            gate.release()

    asyncio.run(main())


def test_a_stream_raises_the_error_of_its_value_function() -> None:
    async def main() -> None:
        async with running() as engine:
            with pytest.raises(ValueFunctionError, match="by nothing"):
                await read(engine, params=SEARCH.replace(value_fn=BAD["raises"][0]))

    asyncio.run(main())


def test_an_engine_can_be_shut_down_while_a_value_function_hangs(gate: Gate) -> None:
    async def main() -> None:
        async with running() as engine:
            task = asyncio.create_task(read(engine, params=SEARCH.replace(value_fn=gate)))
            await gate.arrival()
            await asyncio.wait_for(engine.shutdown(drain=0), 20)
            assert (await task)[-1].outputs[0].finish_reason == "abort"
            gate.release()

    asyncio.run(main())


def collected(asking: Asking, count: int) -> list[Answer]:
    answers: list[Answer] = []
    while len(answers) < count:
        asking.wait(1)
        answers += asking.collect()
    return answers


def test_each_answer_is_given_once_and_to_whom_it_belongs() -> None:
    asking = Asking()
    for name in "abc":
        asking.start(name, Ask(list, [ord(name)], 60))
    assert sorted(collected(asking, 3)) == [("a", [97.0]), ("b", [98.0]), ("c", [99.0])]
    asking.wait(60)
    assert asking.collect() == []


def test_waiting_ends_at_the_nearest_deadline(gate: Gate) -> None:
    asking = Asking()
    asking.start("late", Ask(gate, [1], 60))
    asking.start("soon", Ask(gate, [1], 0.1))
    asking.wait(50)
    [(name, error)] = asking.collect()
    assert name == "soon" and isinstance(error, ValueFunctionError)
    asking.cancel("late")
    asking.wait(60)
    assert asking.collect() == []


def test_an_answer_that_is_there_counts_although_nobody_looked_before_its_deadline() -> None:
    asking = Asking()
    asking.start("a", Ask(list, [1], 0.2))
    time.sleep(0.3)
    assert asking.collect() == [("a", [1.0])]


def test_a_thread_that_can_not_be_started_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking()

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    asking.start("a", Ask(list, [1], 60))
    asking.wait(60)
    [(_, error)] = asking.collect()
    assert isinstance(error, ValueFunctionError) and "can't start new thread" in str(error)


def test_a_function_that_hangs_does_not_hold_up_the_end_of_the_interpreter(tmp_path: Path) -> None:
    code = """import threading
from pagefork.asking import Asking
from pagefork.scheduler.strategies.base import Ask
asking = Asking()
asking.start("a", Ask(lambda items: threading.Event().wait(), [1], 0.1))
asking.wait(60)
print(asking.collect())"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "0.1 seconds" in done.stdout and (done.returncode, done.stderr) == (0, "")


def test_a_value_function_is_named_where_the_engine_has_it_and_made_for_the_prompts_text() -> None:
    prompts = []

    def made(prompt: str) -> Callable[[list[Leaf]], list[float]]:
        prompts.append(prompt)
        return liking

    engine = LLMEngine(EngineConfig(model="demo", num_blocks=200), value_functions={"liking": made})
    by_name, itself = SEARCH.replace(value_fn="liking"), SEARCH.replace(value_fn=liking)
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode("import os\n")
    results = {}
    for request_id, prompt, params in [("name", "import os\n", by_name), ("ids", ids, by_name), ("function", ids, itself)]:
        engine.add_request(request_id, prompt, params)
        while engine.has_unfinished_requests():
            results |= {output.request_id: output for output in engine.step()}
    assert prompts == ["import os\n"] * 2
    tokens = {name: output.outputs[0].token_ids for name, output in results.items()}
    assert tokens["name"] == tokens["ids"] == tokens["function"]


def test_a_name_of_no_value_function_and_one_that_can_not_be_made_are_refused() -> None:
    def unmade(prompt: str) -> Callable[[list[Leaf]], list[float]]:
        raise LookupError(prompt)

    engine = LLMEngine(EngineConfig(model="demo", num_blocks=100), value_functions={"unmade": unmade})
    known = "log_probability, brackets_balance, parses_as_python, unmade"
    with pytest.raises(ParameterError, match=f"no value function 'mine'; it has {known}"):
        engine.add_request("0", "x", SEARCH.replace(value_fn="mine"))
    with pytest.raises(ParameterError, match="'unmade' can't be made for this prompt: LookupError"):
        engine.add_request("0", "x", SEARCH.replace(value_fn="unmade"))
    assert not engine.has_unfinished_requests()

"""LLMEngine, as a service embeds it: steps, aborts, failures, threads, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from pagefork import EngineConfig, EngineMisuseError, InvalidRequestError, LLMEngine, RequestOutput, SamplingParams
from pagefork.scheduler.errors import NumericError, StepFailedError

GREEDY = SamplingParams(temperature=0, max_tokens=10)


@pytest.fixture
def engine() -> Any:
    engine = LLMEngine(EngineConfig(model="demo", dtype="float32", num_blocks=200, max_num_seqs=16))
    yield engine
    finish(engine)
    engine.check()
    stats = engine.stats()
    assert stats.free_blocks == stats.num_blocks and not stats.num_running and not stats.num_waiting


def finish(engine: LLMEngine) -> dict[str, RequestOutput]:
    done = {}
    while engine.has_unfinished_requests():
        done.update({output.request_id: output for output in engine.step() if output.finished})
    return done


def test_outputs_grow_step_by_step_and_end_once(engine: LLMEngine) -> None:
    engine.add_request("a", "def f(", GREEDY)
    seen: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        seen += engine.step()
    assert [len(output.outputs[0].token_ids) for output in seen] == list(range(1, 11))
    assert all(after.outputs[0].text.startswith(before.outputs[0].text) for before, after in pairwise(seen))
    assert [output.finished for output in seen] == [False] * 9 + [True]
    metrics = seen[-1].metrics
    assert metrics.first_token_time and metrics.finished_time
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_requests_join_a_running_batch_and_change_nobody(engine: LLMEngine) -> None:
    engine.add_request("a", "def f(", GREEDY)
    alone = finish(engine)["a"].outputs[0].token_ids
    engine.add_request("a", "def f(", GREEDY)
    outputs: dict[str, RequestOutput] = {}
    for i in range(5):
        outputs.update({output.request_id: output for output in engine.step()})
        engine.add_request(f"b{i}", "import os" * (i + 1), SamplingParams(n=2, max_tokens=5))
    outputs.update(finish(engine))
    assert outputs["a"].outputs[0].token_ids == alone


def test_abort_delivers_one_terminal_output_with_what_there_was(engine: LLMEngine) -> None:
    engine.add_request("waiting", "x", GREEDY)
    engine.abort_request("waiting")
    engine.add_request("running", "y", GREEDY)
    first = {output.request_id: output for output in engine.step()}
    assert first["waiting"].finished and first["waiting"].outputs[0].finish_reason == "abort"
    engine.abort_request("running")
    engine.abort_request("running")
    engine.abort_request("nobody")
    last = engine.step()
    assert [output.request_id for output in last] == ["running"]
    assert len(last[0].outputs[0].token_ids) == 1 and last[0].outputs[0].finish_reason == "abort"


def test_an_id_can_be_used_again_only_after_its_end(engine: LLMEngine) -> None:
    engine.add_request("a", "x", GREEDY)
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add_request("a", "x", GREEDY)
    finish(engine)
    engine.add_request("a", "x", GREEDY)


@pytest.mark.parametrize("request_id", ["", 3, None, "x\ud800"])
def test_ids_are_texts(engine: LLMEngine, request_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="request_id="):
        engine.add_request(request_id, "x", GREEDY)


def test_a_step_that_raises_ends_its_requests_with_the_cause_and_the_engine_goes_on(engine: LLMEngine) -> None:
    engine.add_request("a", "x", GREEDY)
    engine.step()
    forward = engine._runner._model.forward

    def broken(*args: Any) -> torch.Tensor:
        raise MemoryError("none left")

    engine._runner._model.forward = broken  # type: ignore[method-assign]
    output = engine.step()[0]
    engine._runner._model.forward = forward  # type: ignore[method-assign]
    assert output.finished and output.outputs[0].finish_reason == "error"
    assert isinstance(output.error, StepFailedError) and isinstance(output.error.__cause__, MemoryError)
    assert len(output.outputs[0].token_ids) == 1
    engine.add_request("a", "x", GREEDY)
    assert len(finish(engine)["a"].outputs[0].token_ids) == 10


def test_nan_logits_end_their_request_and_its_neighbours_do_not_notice(engine: LLMEngine) -> None:
    engine.add_request("good", "def f(", GREEDY)
    alone = finish(engine)["good"].outputs[0].token_ids
    engine.add_request("bad", "import os\n" * 10, GREEDY)
    engine.add_request("good", "def f(", GREEDY)
    engine.step()
    logits = engine._runner._model.logits

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden).clone()
        found[0] = torch.nan
        return found

    engine._runner._model.logits = poisoned  # type: ignore[method-assign]
    done = {output.request_id: output for output in engine.step() if output.finished}
    engine._runner._model.logits = logits  # type: ignore[method-assign]
    done.update(finish(engine))
    assert isinstance(done["bad"].error, NumericError)
    assert done["good"].outputs[0].token_ids == alone
    assert engine.stats().cached_blocks == 0, "blocks of a NaN request stay out of the prefix cache"


def test_another_thread_and_a_step_inside_a_step_are_refused(engine: LLMEngine) -> None:
    engine.add_request("a", "x", GREEDY)
    caught: list[BaseException] = []

    def intrude() -> None:
        try:
            engine.step()
        except EngineMisuseError as error:
            caught.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert "belongs to the thread" in str(caught[0])
    forward = engine._runner._model.forward

    def nested(*args: Any) -> torch.Tensor:
        with pytest.raises(EngineMisuseError, match="inside its own step"):
            engine.step()
        with pytest.raises(EngineMisuseError, match="inside its own step"):
            engine.abort_request("a")
        with pytest.raises(EngineMisuseError, match="inside its own step"):
            engine.add_request("b", "x", GREEDY)
        return forward(*args)

    engine._runner._model.forward = nested  # type: ignore[method-assign]
    assert len(finish(engine)["a"].outputs[0].token_ids) == 10
    engine._runner._model.forward = forward  # type: ignore[method-assign]


def test_ctrl_c_inside_a_step_is_held_until_the_step_is_applied(engine: LLMEngine) -> None:
    engine.add_request("a", "x", GREEDY)
    forward = engine._runner._model.forward

    def interrupted(*args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return forward(*args)

    engine._runner._model.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine._runner._model.forward = forward  # type: ignore[method-assign]
    engine.check()
    assert len(engine.step()[0].outputs[0].token_ids) == 1, "what the interrupted step found is delivered by the next"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_any_handler_of_ctrl_c_waits_for_the_step(engine: LLMEngine) -> None:
    """asyncio.run installs one of its own, and so do programs."""
    engine.add_request("a", "x", GREEDY)
    forward = engine._runner._model.forward

    def interrupted(*args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return forward(*args)

    def own(signum: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGINT, own)
    try:
        engine._runner._model.forward = interrupted  # type: ignore[method-assign]
        with pytest.raises(TimeoutError):
            engine.step()
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
        engine._runner._model.forward = forward  # type: ignore[method-assign]
    assert len(finish(engine)["a"].outputs[0].token_ids) == 10


def test_an_interrupt_that_reaches_into_a_step_ends_its_requests_and_leaves_the_engine_usable(engine: LLMEngine) -> None:
    engine.add_request("a", "x", GREEDY)
    forward = engine._runner._model.forward

    def interrupted(*args: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    engine._runner._model.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine._runner._model.forward = forward  # type: ignore[method-assign]
    [output] = engine.step()
    assert isinstance(output.error, StepFailedError)
    engine.add_request("a", "x", GREEDY)
    assert len(finish(engine)["a"].outputs[0].token_ids) == 10


def test_prefix_hits_do_not_change_tokens_and_are_reported(engine: LLMEngine) -> None:
    tokens = np.random.default_rng(0).integers(1, 4096, 100).tolist()
    engine.add_request("cold", tokens, GREEDY)
    cold = finish(engine)["cold"]
    engine.add_request("warm", tokens, GREEDY)
    warm = finish(engine)["warm"]
    assert (cold.metrics.cached_tokens, warm.metrics.cached_tokens) == (0, 96)
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


def test_info_tells_what_was_loaded(engine: LLMEngine) -> None:
    info = engine.info()
    assert info["parameters"] == 5_770_496 and info["architecture"] == "LlamaForCausalLM"
    assert info["num_blocks"] == 200 and info["hidden_states"]
    assert info["cache_memory"] == 201 * 16 * (2 * 6 * 4 * 32 + 256) * 4
    assert info["device"] == "cpu" and info["cpu_path"] and info["threads"] == 1


def test_threads_are_as_many_as_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        assert LLMEngine(EngineConfig(model="demo", num_blocks=64, num_threads=2)).info()["threads"] == 2
    finally:
        torch.set_num_threads(before)

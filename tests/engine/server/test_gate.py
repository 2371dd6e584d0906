"""The gate over a real engine: tokenised beside it, computed in its thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from pagefork import LLM, EngineConfig, EngineStats, InvalidRequestError, MCTSParams, RequestOutput, SamplingParams
from pagefork.engine_thread import Event, Queued
from pagefork.limits import LimitError
from pagefork.server.gate import EngineGate
from pagefork.value_functions import ValueFunction, brackets_balance

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = GREEDY.replace(max_tokens=200)
SECONDS = 30.0
_texts: list[str] = []  # that value functions were made for


@dataclass(eq=False)
class Request:
    """A ticket."""

    request_id: str
    events: list[Event] = field(default_factory=list)


def recorded(text: str) -> ValueFunction:
    _texts.append(text)
    return brackets_balance(text)


class Loop:
    """What the service's loop does: sleep until woken, and take."""

    def __init__(self) -> None:
        self.woken = threading.Event()
        config = EngineConfig(model="demo", dtype="float32", num_blocks=120, max_model_len=256)
        self.gate = EngineGate(config, self.woken.set, {"recorded": recorded})

    def turn(self, seconds: float = SECONDS) -> bool:
        """Whether something came."""
        woken = self.woken.wait(seconds)
        self.woken.clear()
        for ticket, event in self.gate.take().items():
            assert isinstance(ticket, Request)
            ticket.events.append(event)
        return woken

    def end(self, request: Request) -> Event:
        """The event that ends a request."""
        deadline = time.monotonic() + SECONDS
        while not request.events or not _is_last(request.events[-1]):
            assert time.monotonic() < deadline and self.turn()
        return request.events[-1]


def _is_last(event: Event) -> bool:
    return isinstance(event, Exception) or (isinstance(event, RequestOutput) and event.finished)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    made = Loop()
    made.gate.start()
    while not made.gate.loaded.done():
        made.turn()
    yield made
    assert made.gate.stop(SECONDS)


@contextmanager
def tokenizers_held(loop: Loop) -> Iterator[None]:
    """No text is tokenised before the end of the block."""
    release, pool = threading.Event(), loop.gate._pool
    for _ in range(pool._max_workers):
        pool.submit(release.wait)
    try:
        yield
    finally:
        release.set()


def run(loop: Loop, prompt: Any, params: Any = GREEDY, name: str = "one", **fields: Any) -> Request:
    request = Request(name)
    loop.gate.add(request, prompt, params, **fields)
    loop.end(request)
    return request


@pytest.mark.parametrize("prompt", ["def f(", "", [5, 6, 7]])
def test_prompts_get_what_the_engine_in_process_gives(loop: Loop, demo: LLM, prompt: Any) -> None:
    expected = demo.generate([prompt], GREEDY, use_tqdm=False)[0]
    output = run(loop, prompt).events[-1]
    assert isinstance(output, RequestOutput)
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.outputs == expected.outputs


def test_a_request_that_has_to_wait_is_announced(loop: Loop) -> None:
    first = run(loop, "def f(").events[0]
    assert isinstance(first, Queued | RequestOutput)


@pytest.mark.parametrize("prompt", ["a \ud800 b", [], [-1], [1 << 31], "x " * 5000])
def test_what_can_not_be_a_prompt_is_the_only_event(loop: Loop, prompt: Any) -> None:
    [event] = run(loop, prompt).events
    assert isinstance(event, InvalidRequestError)


def test_a_value_function_that_is_named_is_made_for_the_text_that_came(loop: Loop) -> None:
    text = "<|endoftext|>def f("  # decoded, its tokens would be another text
    _texts.clear()
    params = MCTSParams(max_tokens=2, num_simulations=2, value_fn="recorded")
    output = run(loop, text, params).events[-1]
    assert isinstance(output, RequestOutput) and output.error is None
    assert _texts == [text]


def test_an_abort_wins_over_the_tokenizer(loop: Loop) -> None:
    request = Request("aborted")
    with tokenizers_held(loop):
        loop.gate.add(request, "def f(", LONG)
        loop.gate.abort(request)
    output = loop.end(request)
    assert isinstance(output, RequestOutput)
    assert output.outputs[0].finish_reason == "abort"
    assert not loop.gate._reading and not loop.gate._aborted


def test_an_abort_of_what_can_not_be_tokenised_changes_nothing(loop: Loop) -> None:
    request = Request("aborted")
    with tokenizers_held(loop):
        loop.gate.add(request, "a \ud800 b", LONG)
        loop.gate.abort(request)
    assert isinstance(loop.end(request), InvalidRequestError)
    assert not loop.gate._reading and not loop.gate._aborted


def test_a_discard_wins_over_the_tokenizer_also_for_a_name_that_comes_again(loop: Loop) -> None:
    discarded, again = Request("name"), Request("name")
    with tokenizers_held(loop):
        loop.gate.add(discarded, "def f(", LONG)
        loop.gate.abort(discarded)
        loop.gate.discard(discarded)
        loop.gate.add(again, "def f(", GREEDY)
    output = loop.end(again)
    assert isinstance(output, RequestOutput) and len(output.outputs[0].token_ids) == 6
    assert discarded.events == []
    assert not loop.gate._reading and not loop.gate._aborted


def test_running_requests_are_aborted_and_discarded(loop: Loop) -> None:
    aborted, discarded = Request("a"), Request("d")
    for request in (aborted, discarded):
        loop.gate.add(request, [1, 2, 3], LONG)
    loop.gate.discard(discarded)
    loop.gate.abort(aborted)
    output = loop.end(aborted)
    assert isinstance(output, RequestOutput) and output.outputs[0].finish_reason == "abort"
    replies: list[EngineStats] = []
    loop.gate.stats(replies.append)
    while not replies:
        assert loop.turn()
    assert (replies[0].num_running, replies[0].num_waiting) == (0, 0)
    assert replies[0].free_blocks == replies[0].num_blocks
    assert not any(_is_last(event) for event in discarded.events)


def test_an_idle_engine_wakes_nobody(loop: Loop) -> None:
    run(loop, "def f(")
    loop.turn(0.05)
    assert not loop.turn(0.2)
    assert not loop.gate.moment.busy


def test_prompts_are_logged_when_that_is_asked_for_and_else_not(
    loop: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("DEBUG")
    run(loop, "def secret(")
    assert "secret" not in str([vars(record) for record in caplog.records])
    monkeypatch.setattr(loop.gate, "_log_prompts", True)
    run(loop, "def secret(")
    assert [vars(record)["fields"]["prompt"] for record in caplog.records if record.msg == "request.prompt"] == ["def secret("]


@pytest.mark.parametrize("as_text", [True, False])
def test_an_output_that_does_not_fit_after_its_prompt_is_refused_by_one_token(loop: Loop, as_text: bool) -> None:
    loaded = loop.gate.loaded.result()
    prompt = "def f(a, b):\n"
    ids = list(loaded.prompts.read(prompt))
    room = loaded.facts["max_model_len"] - len(ids)
    fits, none, over = Request(f"fits {as_text}"), Request(f"none {as_text}"), Request(f"over {as_text}")
    for request, count in [(fits, room), (none, None), (over, room + 1)]:
        loop.gate.add(request, prompt if as_text else ids, GREEDY.replace(max_tokens=count))
    refusal = loop.end(over)
    assert isinstance(refusal, LimitError) and f"at most {room} fit" in str(refusal)
    for request in (fits, none):
        output = loop.end(request)
        assert isinstance(output, RequestOutput) and len(output.outputs[0].token_ids) == room

"""What a Submit may ask for, and what it is told."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from support.service_by_hand import FACTS, Hand, output

from pagefork import wire
from pagefork.engine_thread import Queued
from pagefork.limits import LimitError
from pagefork.scheduler.errors import (
    BudgetExceededError,
    InvalidRequestError,
    KVExhaustedError,
    NoTokenError,
    NumericError,
    PageforkError,
    ParameterError,
    StepFailedError,
    ValueFunctionError,
)
from pagefork.scheduler.params import SamplingParams
from pagefork.wire import Code


def refused(messages: list[Any], rid: str = "r") -> wire.Error:
    [error] = messages
    assert isinstance(error, wire.Error) and error.rid == rid
    return error


def ready(**limits: int) -> Hand:
    hand = Hand(**limits)
    hand.hello()
    return hand


def test_the_engine_is_given_what_was_asked_for() -> None:
    hand = ready()
    params = SamplingParams(n=2, temperature=0.5, stop=["\n"])
    assert hand.submit(prompt=[5, 6, 7], params=params, priority=-3) == []
    assert hand.submit("s", prompt="a text") == []
    [(first, tokens, given, fields), (second, text, default, _)] = hand.gate.added
    assert (tokens, given, text, default) == ([5, 6, 7], params, "a text", None)
    assert fields == {"priority": -3, "salt": "me", "max_forward_tokens": 1 << 21}
    assert first.request_id != second.request_id


def test_accepted_comes_when_the_engine_has_queued_it_and_once() -> None:
    hand = ready()
    hand.submit()
    ticket = hand.gate.added[0][0]
    hand.deliver(ticket, Queued(4))
    assert hand.take() == [wire.Accepted(rid="r", queue_position=4)]
    hand.submit("late")
    ticket = hand.gate.added[1][0]
    hand.deliver(ticket, output(ticket, 1))  # it overtook the Queued
    hand.deliver(ticket, Queued(0))
    assert [type(message) for message in hand.take()] == [wire.Accepted, wire.Deltas]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequestError("no"), Code.INVALID_ARGUMENT),
        (ParameterError("no"), Code.INVALID_ARGUMENT),
        (LimitError("no"), Code.TOO_LARGE),
        (RuntimeError("a secret of the engine"), Code.INTERNAL),
        (ValueError("a bug"), Code.INTERNAL),
    ],
)
def test_what_the_engine_refuses_leaves_no_trace(error: Exception, code: Code) -> None:
    hand = ready()
    hand.submit()
    hand.deliver(hand.gate.added[0][0], error)
    told = refused(hand.take())
    assert told.code == code and (told.message == "no") == (code is not Code.INTERNAL)
    assert "secret" not in told.message
    assert hand.stats().requests == hand.stats().reserved_tokens == 0
    hand.submit(prompt=[9])  # the rid is free
    assert hand.gate.added[1][1] == [9]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KVExhaustedError("it"), Code.KV_EXHAUSTED),
        (NumericError("it"), Code.NUMERIC),
        (NoTokenError("it"), Code.NO_TOKEN),
        (ValueFunctionError("it"), Code.VALUE_FUNCTION),
        (StepFailedError("it"), Code.STEP_FAILED),
        (BudgetExceededError("it"), Code.BUDGET_EXCEEDED),
        (PageforkError("it"), Code.INTERNAL),
    ],
)
def test_a_request_that_fails_says_why(error: PageforkError, code: Code) -> None:
    hand = ready()
    ticket = hand.open()
    hand.deliver(ticket, output(ticket, 2, finish="error", error=error))
    deltas, finished = hand.take()
    assert finished.error == wire.Failure(code=code, message="it")
    assert deltas.deltas[0].tokens == [0, 1] and finished.outputs[0].finish_reason == "error"
    assert hand.stats().failed == {code: 1}


def test_the_same_body_attaches_and_another_is_refused() -> None:
    hand = ready()
    ticket = hand.open()
    hand.deliver(ticket, output(ticket, 2))
    hand.take()
    accepted, deltas = hand.submit()
    assert accepted == wire.Accepted(rid="r", attached=True)
    assert (deltas.deltas[0].start, deltas.deltas[0].tokens) == (0, [0, 1])
    for other in ({"prompt": [1, 2]}, {"prompt": "text"}, {"params": SamplingParams(n=2)}, {"priority": 1}, {"stream": False}):
        assert refused(hand.submit(**other)).code == Code.DUPLICATE_MISMATCH
    hand.deliver(ticket, output(ticket, 2, finish="stop"))
    assert [type(message) for message in hand.take()] == [wire.Finished]
    accepted, deltas, finished = hand.submit()
    assert accepted.attached and deltas.deltas[0].tokens == [0, 1] and finished.outputs[0].finish_reason == "stop"
    assert len(hand.gate.added) == 1


def test_a_body_asked_twice_before_it_is_accepted_is_accepted_once() -> None:
    hand = ready()
    assert hand.submit() == hand.submit() == []
    hand.deliver(hand.gate.added[0][0], Queued(0))
    assert hand.take() == [wire.Accepted(rid="r", attached=True)]
    assert len(hand.gate.added) == 1


def test_equal_rids_of_two_sessions_are_two_requests() -> None:
    hand = ready()
    hand.hello(b"q")
    mine, theirs = hand.open(), hand.open(peer=b"q")
    hand.deliver(theirs, output(theirs, 1))
    assert hand.take() == [] and len(hand.take(b"q")) == 1
    hand.say(b"q", wire.Abort(rid="r"))
    assert hand.gate.aborted == [theirs] and mine.request_id != theirs.request_id


def encoded(params: Any) -> dict[str, Any]:
    return {"params": msgspec.Raw(msgspec.msgpack.encode(params))}


@pytest.mark.parametrize(
    ("message", "blob", "code"),
    [
        ({}, None, Code.INVALID_ARGUMENT),
        ({"text": "both"}, b"", Code.INVALID_ARGUMENT),
        ({}, b"", None),  # an empty prompt is for the engine to refuse
        ({}, b"123", Code.INVALID_ARGUMENT),
        ({}, struct.pack("<I", FACTS.vocab_size - 1), None),
        ({}, struct.pack("<I", FACTS.vocab_size), Code.INVALID_ARGUMENT),
        ({}, bytes(4 * (FACTS.max_model_len - 1)), None),
        ({}, bytes(4 * FACTS.max_model_len), Code.INVALID_ARGUMENT),
        ({"text": "x", **encoded({"type": "sampling", "n": 0})}, None, Code.INVALID_ARGUMENT),
        ({"text": "x", **encoded({"type": "sampling", "best": 1})}, None, Code.INVALID_ARGUMENT),
        ({"text": "x", **encoded({"type": "nonsense"})}, None, Code.INVALID_ARGUMENT),
        ({"text": "x", **encoded({"type": "sampling", "logits_processors": ["os.system"]})}, None, Code.INVALID_ARGUMENT),
        ({"text": "x", "params": msgspec.Raw(b"\x91" * 900 + b"\xc0")}, None, Code.INVALID_ARGUMENT),
        ({"text": "x", **encoded({"type": "sampling", "n": 128})}, None, None),
        ({"text": "x", **encoded({"type": "sampling", "n": 129})}, None, Code.TOO_LARGE),
        ({"text": "x", **encoded({"type": "sampling", "bad_words": [f"{n:04}" * 64 for n in range(1024)]})}, None, None),
        ({"text": "x", **encoded({"type": "sampling", "n": [0] * 400_000})}, None, Code.TOO_LARGE),  # before it is read
        ({"text": "é" * 50}, None, None),
        ({"text": "é" * 51}, None, Code.TOO_LARGE),
    ],
)
def test_a_submit_that_asks_for_nonsense_is_refused_and_is_no_bad_message(
    message: dict[str, Any], blob: bytes | None, code: Code | None
) -> None:
    hand = ready(max_text_bytes=100)
    answers = hand.say(b"p", wire.Submit(rid="r", **message), blob)
    if code is None:
        assert answers == [] and len(hand.gate.added) == 1
    else:
        assert refused(answers).code == code and not hand.gate.added
        assert hand.stats().refused == {code: 1}
    assert hand.stats().malformed_frames == 0


def test_a_prompt_above_the_budget_is_too_large() -> None:
    hand = ready(max_forward_tokens=4)
    assert refused(hand.submit(prompt=[1] * 5)).code == Code.TOO_LARGE
    assert hand.submit(prompt=[1] * 4) == []


def test_the_limit_of_requests_counts_until_finished_is_sent() -> None:
    hand = ready(max_requests=2)
    ticket = hand.open("a", credit=0)
    hand.open("b")
    full = refused(hand.submit("c"), "c")
    assert full.code == Code.QUEUE_FULL and full.retry_after_ms == 1000
    hand.deliver(ticket, output(ticket, 1, finish="stop"))
    assert refused(hand.submit("c"), "c").code == Code.QUEUE_FULL
    hand.say(b"p", wire.Credit(rid="a", upto=1))
    assert hand.submit("c") == []


def test_reserved_tokens_are_bytes_of_a_text_until_its_tokens_are_known() -> None:
    hand = ready(max_reserved_tokens=10)
    hand.submit("text", prompt="ééé")
    assert hand.stats().reserved_tokens == 6
    assert refused(hand.submit("b", prompt=[1] * 5), "b").code == Code.QUEUE_FULL
    ticket = hand.gate.added[0][0]
    hand.deliver(ticket, output(ticket, 1, prompt=[7, 8]))
    hand.take()
    assert hand.stats().reserved_tokens == 2
    assert hand.submit("b", prompt=[1] * 5) == []
    hand.deliver(ticket, output(ticket, 1, finish="stop", prompt=[7, 8]))
    assert hand.stats().reserved_tokens == 5
    hand.take()
    assert refused(hand.submit("c", prompt=[1] * 11), "c").code == Code.TOO_LARGE  # it never has room


def test_when_to_try_again_follows_how_fast_requests_end() -> None:
    hand = ready(max_requests=1)
    for number in range(5):
        ticket = hand.open(str(number))
        hand.now += 0.5
        hand.deliver(ticket, output(ticket, 1, finish="stop"))
        hand.take()
    hand.open("last")
    assert refused(hand.submit("x"), "x").retry_after_ms == 500
    hand.now += 1e6
    hand.hello()
    hand.open("last")  # nothing ran meanwhile, which says nothing of how fast requests end
    assert refused(hand.submit("x"), "x").retry_after_ms == 500
    for _ in range(6):
        hand.now += 10.0
        hand.say(b"p", wire.Ping())
    assert refused(hand.submit("x"), "x").retry_after_ms == 10_000


def test_a_gate_that_fails_is_an_error_of_that_request() -> None:
    hand = ready()
    hand.gate.failure = OSError("no thread")
    assert refused(hand.submit()).code == Code.INTERNAL
    hand.gate.failure = None
    assert hand.submit() == []
    assert hand.stats().requests == 1


def test_a_prompt_that_came_as_text_comes_back_as_tokens() -> None:
    hand = ready()
    for rid, prompt, blob in (("text", "ab", struct.pack("<2I", 4, 5)), ("tokens", [4, 5], None)):
        hand.submit(rid, prompt=prompt)
        ticket = hand.gate.added[-1][0]
        hand.deliver(ticket, output(ticket, 1, finish="stop", prompt=[4, 5]))
        message, got = hand.inbox.pop(b"p")[-1]
        assert isinstance(message, wire.Finished) and got == blob and message.usage.prompt_tokens == 2


def test_a_text_that_no_context_could_hold_is_refused_before_it_is_tokenised() -> None:
    hand = ready()
    assert hand.submit(prompt="x" * (64 * FACTS.max_model_len)) == []
    assert refused(hand.submit("s", prompt="x" * (64 * FACTS.max_model_len + 1)), "s").code == Code.INVALID_ARGUMENT
    assert len(hand.gate.added) == 1


def test_a_bad_message_is_answered_with_the_rid_that_it_names() -> None:
    hand = ready()
    header = wire.encode(wire.Submit(rid="r"))[0]
    hand.service.receive(b"p", [header, msgspec.msgpack.encode({"rid": "r", "txt": "misspelt"})], "me")
    error = refused(hand.take())
    assert error.code == Code.INVALID_ARGUMENT and "txt" in error.message
    hand.service.receive(b"p", [header, msgspec.msgpack.encode({"rid": "no rid", "text": "x"})], "me")
    [error] = hand.take()
    assert error.rid is None

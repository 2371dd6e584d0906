"""However a request ends, it ends once, and its client is told."""

from __future__ import annotations

from typing import Any

import pytest
from support.service_by_hand import STATS, Hand, output

from pagefork import wire
from pagefork.engine_thread import Moment, Queued
from pagefork.scheduler.accounting import Trace, Usage
from pagefork.scheduler.errors import StepFailedError
from pagefork.server.seam import Sent, Timing
from pagefork.wire import Code


def ready(timing: Timing | None = None, **limits: int) -> Hand:
    hand = Hand(timing, **limits)
    hand.hello()
    return hand


def kinds(messages: list[Any]) -> list[type]:
    return [type(message) for message in messages]


def failure(message: Any) -> str | None:
    assert isinstance(message, wire.Finished)
    return message.error.code if message.error else None


def keep_alive(hand: Hand, seconds: float) -> list[Any]:
    """Time passes for a client that pings; what else it gets."""
    messages: list[Any] = []
    while seconds > 0:
        hand.pass_time(min(seconds, 5))
        messages += hand.say(b"p", wire.Ping())
        seconds -= 5
    return [message for message in messages if not isinstance(message, wire.Pong)]


def test_abort_before_acceptance_refuses_the_request() -> None:
    hand = ready()
    hand.submit()
    [error] = hand.say(b"p", wire.Abort(rid="r"))
    assert (error.code, error.rid) == (Code.CANCELLED, "r")
    ticket = hand.gate.added[0][0]
    assert hand.gate.discarded == [ticket]
    hand.deliver(ticket, Queued(0))
    hand.deliver(ticket, output(ticket, 1))
    assert hand.take() == [] and hand.stats().requests == 0


@pytest.mark.parametrize("have", [0, 1])
def test_an_end_that_cut_an_output_is_the_same_when_it_is_asked_for_again(have: int) -> None:
    hand = ready()
    ticket = hand.open(credit=1)
    hand.deliver(ticket, output(ticket, 6, finish="stop", logprobs=True))
    hand.take()
    [first] = hand.say(b"p", wire.Abort(rid="r"))
    again = hand.say(b"p", wire.Attach(rid="r", have=[wire.Have(have, 0)], credit=1000))[-1]
    assert first.outputs[0].start == 1 and first.outputs[0].finish_reason == "abort"
    assert (again.outputs[0].start, again.outputs[0].finish_reason) == (1, "abort")
    assert (again.usage, again.error) == (first.usage, first.error)


def test_abort_of_a_running_request_brings_what_there_was() -> None:
    hand = ready()
    ticket = hand.open()
    hand.deliver(ticket, output(ticket, 2))
    hand.take()
    assert hand.say(b"p", wire.Abort(rid="r")) == hand.say(b"p", wire.Abort(rid="r")) == []
    assert hand.gate.aborted == [ticket]
    hand.deliver(ticket, output(ticket, 3, finish="abort"))
    deltas, finished = hand.take()
    assert deltas.deltas[0].tokens == [2] and failure(finished) == Code.CANCELLED
    assert finished.outputs[0].finish_reason == "abort" and finished.usage.completion_tokens == 3
    assert hand.say(b"p", wire.Abort(rid="r")) == hand.say(b"p", wire.Abort(rid="unknown")) == []


def test_an_abort_that_comes_too_late_changes_nothing() -> None:
    hand = ready()
    ticket = hand.open()
    hand.say(b"p", wire.Abort(rid="r"))
    hand.deliver(ticket, output(ticket, 3, finish="length"))
    finished = hand.take()[-1]
    assert failure(finished) is None and finished.outputs[0].finish_reason == "length"


def test_an_aborted_request_does_not_wait_for_credit_and_sends_nothing_beyond_it() -> None:
    hand = ready()
    ticket = hand.open(credit=2)
    hand.deliver(ticket, output(ticket, 5))
    hand.say(b"p", wire.Abort(rid="r"))
    hand.deliver(ticket, output(ticket, 6, finish="abort"))
    [finished] = hand.take()
    [final] = finished.outputs
    assert (final.start, final.tokens, finished.usage.completion_tokens) == (2, [], 2)


def test_a_request_that_ended_and_waits_for_credit_can_be_aborted() -> None:
    hand = ready()
    ticket = hand.open(credit=2)
    hand.deliver(ticket, output(ticket, 5, finish="stop"))
    assert kinds(hand.take()) == [wire.Deltas]
    [finished] = hand.say(b"p", wire.Abort(rid="r"))
    assert failure(finished) == Code.CANCELLED and finished.outputs[0].finish_reason == "abort"


def test_an_engine_that_does_not_answer_an_abort_is_not_waited_for() -> None:
    hand = ready()
    ticket = hand.open()
    hand.deliver(ticket, output(ticket, 2))
    hand.take()
    hand.say(b"p", wire.Abort(rid="r"))
    hand.pass_time(2.1)
    [finished] = hand.take()
    assert failure(finished) == Code.CANCELLED and hand.gate.discarded == [ticket]
    hand.deliver(ticket, output(ticket, 3, finish="abort"))
    assert hand.take() == []


def test_a_deadline_before_acceptance_refuses_the_request() -> None:
    hand = ready()
    hand.submit(deadline_ms=100)
    hand.pass_time(0.09)
    assert hand.take() == []
    hand.pass_time(0.03)
    [error] = hand.take()
    assert (error.code, error.rid) == (Code.DEADLINE, "r") and len(hand.gate.discarded) == 1


def test_a_deadline_ends_a_running_request_with_what_there_was() -> None:
    hand = ready()
    ticket = hand.open(deadline_ms=100, stream=False)
    hand.deliver(ticket, output(ticket, 2))
    hand.pass_time(0.12)
    assert hand.take() == [] and hand.gate.aborted == [ticket]
    hand.deliver(ticket, output(ticket, 3, finish="abort"))
    [finished] = hand.take()
    assert failure(finished) == Code.DEADLINE and finished.outputs[0].tokens == [0, 1, 2]


def test_a_request_that_failed_by_itself_says_that_and_not_why_it_was_to_end() -> None:
    hand = ready()
    ticket = hand.open(deadline_ms=100)
    hand.pass_time(0.12)
    hand.deliver(ticket, output(ticket, 1, finish="error", error=StepFailedError("broke")))
    assert failure(hand.take()[-1]) == Code.STEP_FAILED


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_a_client_that_takes_nothing_for_long_is_stalled(full: bool, ended: bool) -> None:
    hand = ready(Timing(stall=30))
    ticket = hand.open(credit=100 if full else 1)
    hand.deliver(ticket, output(ticket, 1))
    hand.take()
    if full:
        hand.state[b"p"] = Sent.FULL
    hand.deliver(ticket, output(ticket, 4, finish="stop" if ended else None))
    assert keep_alive(hand, 29.5) == []
    assert not hand.gate.aborted
    messages = keep_alive(hand, 1)
    if not ended:
        assert hand.gate.aborted == [ticket]
        hand.deliver(ticket, output(ticket, 5, finish="abort"))
        messages += hand.take()
    if full:
        assert messages == [] and not hand.stats().reserved_tokens
        messages += keep_alive(hand, 1)
        del hand.state[b"p"]
        messages += keep_alive(hand, 1)
        messages = [message for message in messages if not isinstance(message, wire.Pong | wire.Deltas)]
    [finished] = messages
    assert failure(finished) == Code.CLIENT_STALLED and hand.stats().requests == 0


def test_a_request_that_failed_keeps_its_reason_when_its_client_is_stalled() -> None:
    hand = ready()
    ticket = hand.open(credit=1)
    hand.deliver(ticket, output(ticket, 4, finish="error", error=StepFailedError("broke")))
    finished = keep_alive(hand, 31)[-1]
    assert failure(finished) == Code.STEP_FAILED and hand.stats().failed == {Code.STEP_FAILED: 1}


def test_new_output_is_no_sign_of_a_reader() -> None:
    hand = ready(Timing(stall=30))
    ticket = hand.open(credit=0)
    for count in range(1, 4):
        hand.deliver(ticket, output(ticket, count))
        keep_alive(hand, 10)
    hand.deliver(ticket, output(ticket, 4))
    keep_alive(hand, 1)
    assert hand.gate.aborted == [ticket]


def test_asking_again_without_credit_is_no_sign_of_a_reader() -> None:
    hand = ready(Timing(stall=30))
    ticket = hand.open(credit=0)
    hand.deliver(ticket, output(ticket, 3))
    for _ in range(3):
        hand.say(b"p", wire.Attach(rid="r"))
        assert not hand.gate.aborted
        keep_alive(hand, 11)
    assert hand.gate.aborted == [ticket]


def test_a_reader_that_goes_on_taking_is_not_stalled_however_slow_it_is() -> None:
    hand = ready(Timing(stall=30))
    ticket = hand.open(credit=0)
    hand.deliver(ticket, output(ticket, 5, finish="length"))
    for upto in range(1, 5):
        keep_alive(hand, 25)
        assert kinds(hand.say(b"p", wire.Credit(rid="r", upto=upto))) == [wire.Deltas]
    keep_alive(hand, 25)
    assert kinds(hand.say(b"p", wire.Credit(rid="r", upto=5))) == [wire.Deltas, wire.Finished]


def test_a_request_without_output_can_wait_for_ever() -> None:
    hand = ready()
    ticket = hand.open(credit=0)
    assert keep_alive(hand, 300) == []
    hand.deliver(ticket, output(ticket, 0, finish="length"))
    assert kinds(hand.take()) == [wire.Finished]


def test_terminals_are_kept_for_a_while() -> None:
    hand = ready(Timing(keep=60))
    ticket = hand.open()
    hand.deliver(ticket, output(ticket, 2, finish="stop"))
    hand.take()
    keep_alive(hand, 59)
    assert kinds(hand.submit()) == [wire.Accepted, wire.Deltas, wire.Finished]
    keep_alive(hand, 59)
    assert kinds(hand.say(b"p", wire.Attach(rid="r", have=[wire.Have(2, 6)]))) == [wire.Accepted, wire.Finished]
    keep_alive(hand, 61)
    [error] = hand.say(b"p", wire.Attach(rid="r"))
    assert (error.code, error.rid) == (Code.INVALID_ARGUMENT, "r")
    assert hand.submit() == [] and len(hand.gate.added) == 2


def test_what_is_asked_again_and_again_is_sent_only_so_often() -> None:
    """It costs its client nothing, and fills the memory where the client does not read."""
    hand = ready(max_kept_bytes=30_000)
    ticket = hand.open("r")
    hand.deliver(ticket, output(ticket, 50, finish="stop"))
    hand.take()
    size = next(iter(hand.service._requests.ledger._kept)).kept_bytes
    answers = [[type(message) for message in hand.submit("r")] for _ in range(30_000 // size + 1)]
    assert answers[:-1] == [[wire.Accepted, wire.Deltas, wire.Finished]] * (30_000 // size) and answers[-1] == [wire.Error]
    [error] = hand.submit("r")
    assert error.code == Code.QUEUE_FULL and error.retry_after_ms is not None
    hand.now += error.retry_after_ms / 1000
    assert [type(message) for message in hand.submit("r")] == [wire.Accepted, wire.Deltas, wire.Finished]


def test_terminals_are_kept_in_so_many_bytes_the_newest() -> None:
    hand = ready(max_kept_bytes=30_000)
    for number in range(20):
        ticket = hand.open(f"r{number}")
        hand.deliver(ticket, output(ticket, 10, finish="stop"))
        hand.take()
    known = [bool(hand.service._sessions.of(b"p", "me").exchanges.get(f"r{number}")) for number in range(20)]  # type: ignore[union-attr]
    assert known == sorted(known) and 5 < sum(known) < 20
    assert 0 < hand.service._requests.ledger._kept_bytes <= 30_000
    hand.say(b"p", wire.Bye())
    assert hand.service._requests.ledger._kept_bytes == 0


def test_draining_refuses_new_requests_lets_others_end_and_says_goodbye() -> None:
    hand = ready()
    ticket = hand.open()
    hand.service.drain(30)
    [error] = hand.submit("new")
    assert error.code == Code.DRAINING and not hand.service.drained
    assert hand.say(b"p", wire.Ping())[0].state == "draining"
    hand.deliver(ticket, output(ticket, 3, finish="stop"))
    assert failure(hand.take()[-1]) is None
    hand.pass_time(0.01)
    assert hand.service.drained and kinds(hand.take()) == [wire.GoAway]
    assert kinds(hand.say(b"q", wire.Hello())) == [wire.GoAway]


def test_draining_ends_in_time_whatever_the_engine_and_the_clients_do() -> None:
    hand = ready()
    ended = hand.open("ended", credit=0)
    hand.deliver(ended, output(ended, 2, finish="stop"))
    running, stuck = hand.open("running"), hand.open("stuck")
    hand.submit("waits")
    hand.service.drain(10)
    hand.pass_time(9)
    assert hand.take() == []
    hand.service.drain(100)  # the shorter one counts
    hand.pass_time(1.1)
    assert hand.gate.aborted == [running, stuck]
    error, finished = sorted(hand.take(), key=lambda message: message.rid, reverse=True)
    assert (error.code, error.rid) == (Code.DRAINING, "waits")
    assert (failure(finished), finished.rid) == (Code.DRAINING, "ended")
    hand.deliver(running, output(running, 1, finish="abort"))
    assert failure(hand.take()[-1]) == Code.DRAINING
    hand.pass_time(2.1)
    finished, goodbye = hand.take()
    assert (failure(finished), finished.rid) == (Code.DRAINING, "stuck")
    assert isinstance(goodbye, wire.GoAway) and hand.service.drained


def test_a_lost_engine_ends_everything_at_once() -> None:
    hand = ready()
    hand.hello(b"q")
    ended, running = hand.open("ended", credit=1), hand.open("running", peer=b"q")
    hand.deliver(ended, output(ended, 2, finish="stop"))
    hand.take()
    hand.submit("waits")
    hand.service.close("it broke")
    mine, theirs = hand.take(), hand.take(b"q")
    assert {getattr(message, "rid", None): type(message) for message in mine} == {
        "ended": wire.Finished, "waits": wire.Error, None: wire.GoAway,
    }  # fmt: skip
    assert [failure(message) for message in mine if isinstance(message, wire.Finished)] == [Code.ENGINE_LOST]
    assert kinds(theirs) == [wire.Finished, wire.GoAway] and failure(theirs[0]) == Code.ENGINE_LOST
    hand.deliver(running, output(running, 3, finish="stop"))
    assert hand.take(b"q") == [] and hand.service.drained


def test_an_output_that_shrinks_is_the_end_of_its_request_only() -> None:
    hand = ready()
    bad, good = hand.open("bad"), hand.open("good")
    hand.deliver(bad, output(bad, 3))
    hand.take()
    hand.service.deliver({bad: output(bad, 2), good: output(good, 1)})
    deltas, finished = hand.take()
    assert [delta.rid for delta in deltas.deltas] == ["good"]
    assert finished.rid == "bad" and failure(finished) == Code.INTERNAL
    assert hand.gate.discarded == [bad]


@pytest.mark.parametrize("finish", [None, "stop"])
def test_an_output_that_cannot_be_encoded_is_the_end_of_its_request_only(finish: str | None) -> None:
    hand = ready()
    bad, good = hand.open("bad"), hand.open("good")
    broken = output(bad, 1, finish=finish)
    broken.outputs[0].token_ids = ["no token", object()]  # type: ignore[list-item]
    hand.service.deliver({good: output(good, 1), bad: broken})
    hand.pass_time(0.1)
    messages = hand.take()
    assert {type(message) for message in messages} == {wire.Deltas, wire.Finished}
    assert all(delta.rid == "good" for message in messages if isinstance(message, wire.Deltas) for delta in message.deltas)
    [finished] = [message for message in messages if isinstance(message, wire.Finished)]
    assert finished.rid == "bad" and failure(finished) == Code.INTERNAL


def test_a_long_trace_is_cut_to_its_limit() -> None:
    for steps in (3, 3000):
        hand = ready(max_trace_bytes=1000)
        ticket = hand.open(stream=False)
        trace = Trace("some", [{"step": number} for number in range(steps)], Usage())
        hand.deliver(ticket, output(ticket, 1, finish="stop", trace=trace))
        [finished] = hand.take()
        assert finished.trace.complete == (steps == 3)
        assert finished.trace.steps == trace.steps[: len(finished.trace.steps)]
        assert max(hand.sizes) < 1500 and (steps == 3 or len(finished.trace.steps) > 80)


def test_numbers_of_the_service_count_what_happened() -> None:
    hand = ready()
    first, second = hand.open("a", stream=False), hand.open("b", stream=False)
    hand.now += 0.05
    hand.deliver(first, output(first, 1))
    hand.now += 0.18
    hand.deliver(first, output(first, 3, finish="stop"))
    hand.deliver(second, output(second, 0, finish="length"))
    hand.submit("c", prompt=[9999])
    stats = hand.stats()
    assert (stats.accepted, stats.finished, stats.refused) == (2, {"stop": 1, "length": 1}, {Code.INVALID_ARGUMENT: 1})

    def observed(histogram: wire.Histogram) -> dict[float, int]:
        return {bound: count for bound, count in zip(histogram.bounds, histogram.counts, strict=False) if count}

    assert observed(stats.time_to_first_token) == {0.06: 1}
    assert observed(stats.inter_token_latency) == {0.1: 2} and stats.inter_token_latency.sum == pytest.approx(0.18)
    assert observed(stats.e2e_request_latency) == {0.3: 2}


def test_pong_tells_how_long_ago_a_step_ended_while_there_is_work() -> None:
    hand = ready()
    hand.gate.moment = Moment(hand.now - 3, running=2, waiting=1, free_blocks=7)
    [pong] = hand.say(b"p", wire.Ping(t=42))
    assert (pong.t, pong.last_step_age_ms, pong.running, pong.waiting, pong.free_blocks) == (42, 3000, 2, 1, 7)
    hand.gate.moment = Moment(hand.now - 3)
    assert hand.say(b"p", wire.Ping())[0].last_step_age_ms == 0


def test_the_engine_is_asked_for_its_numbers_once_for_all_who_wait() -> None:
    hand = ready()
    hand.hello(b"q")
    for peer in (b"p", b"q", b"p"):
        assert hand.say(peer, wire.Stats()) == []
    [reply] = hand.gate.asked
    reply(STATS)
    assert kinds(hand.take()) == [wire.StatsReply] * 2 and kinds(hand.take(b"q")) == [wire.StatsReply]
    hand.say(b"p", wire.Stats())
    assert len(hand.gate.asked) == 2
    keep_alive(hand, 9)
    hand.say(b"p", wire.Stats())
    assert len(hand.gate.asked) == 2
    keep_alive(hand, 2)
    hand.say(b"p", wire.Stats())  # the engine may never have heard it
    assert len(hand.gate.asked) == 3

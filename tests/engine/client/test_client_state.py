"""The client's state machine with a clock that is set by hand: what it sends, and how requests end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from support.client_bench import Bench, Reader, finished, pong, tokens, up, welcome

from pagefork import ServiceError
from pagefork.client.link import Phase
from pagefork.client.prompts import submission
from pagefork.client.request import Arrived
from pagefork.client.state import Ask
from pagefork.wire import (
    Abort,
    Accepted,
    Attach,
    Bye,
    Code,
    Delta,
    Deltas,
    EngineMessage,
    Error,
    GoAway,
    Hello,
    Ping,
    Pong,
    Stats,
    encode,
)


def test_a_request_goes_on_after_a_cut_where_it_was_and_its_reader_sees_nothing_of_it() -> None:
    bench = up()
    reader = bench.submit("a")
    bench.hear(Accepted(rid="a"), tokens("a", 0, 1, 2))
    bench.state.credit("a", 12)
    bench.state.broken("cut")
    [hello] = bench.turn()
    assert isinstance(hello, Hello) and hello.session == b"0123456789abcdef" and hello.token == "token"
    [attach] = bench.hear(welcome(resumed=True))
    assert isinstance(attach, Attach) and attach.credit == 12
    assert [(have.tokens, have.characters) for have in attach.have] == [(2, 2)]
    bench.hear(Accepted(rid="a", attached=True), tokens("a", 2, 3), finished("a", 3))
    assert reader.tokens() == [1, 2, 3] and isinstance(reader.end, Arrived)
    assert sum(isinstance(event, Accepted) for event in reader.events) == 1


def test_a_submit_that_was_not_accepted_is_sent_again_bytes_and_all() -> None:
    bench = up()
    made = submission("a", [1, 2, 3], None, priority=0, deadline=None, credit=8, stream=True)
    bench.state.submit("a", made.frames, Reader(), 8)
    bench.state.tick()
    first = bench.state.take_messages()
    bench.state.broken("cut")
    bench.turn()
    bench.state.receive(encode(welcome(resumed=True)))
    assert bench.state.take_messages() == first == [made.frames]


@pytest.mark.parametrize(
    "loses",
    [
        pytest.param(lambda bench: bench.state.broken("gone"), id="nothing comes back"),
        pytest.param(lambda bench: bench.hear(pong(boot_id="other")), id="another boot id in Pong"),
        pytest.param(lambda bench: bench.hear(GoAway(reason="bye")), id="GoAway"),
        pytest.param(lambda bench: (bench.state.broken("cut"), bench.turn(), bench.hear(welcome())), id="no such session"),
        pytest.param(
            lambda bench: (bench.state.broken("cut"), bench.turn(), bench.hear(welcome("other", True))), id="another engine"
        ),
    ],
)
def test_every_request_ends_with_engine_lost_and_says_whether_tokens_were_read(loses: Callable[[Bench], object]) -> None:
    bench = up()
    read, accepted, sent = (bench.submit(rid) for rid in "abc")
    bench.hear(Accepted(rid="a"), tokens("a", 0, 1), Accepted(rid="b"))
    loses(bench)
    bench.turn(1.6)
    for reader in (read, accepted, sent):
        assert reader.error.code == Code.ENGINE_LOST
        assert reader.error.retry_safe == (reader is not read)
    assert bench.state.session is None or bench.state.phase is Phase.UP


def test_two_pings_without_an_answer_break_the_connection_and_any_message_is_an_answer() -> None:
    bench = up()
    reader = bench.submit("a")
    for _ in range(4):
        assert isinstance(bench.turn(5.0)[-1], Ping)
        bench.hear(Accepted(rid="a"))
    assert [isinstance(message, Ping) for message in bench.turn(5.0) + bench.turn(5.0)] == [True, True]
    assert bench.state.phase is Phase.UP
    assert isinstance(bench.turn(5.0)[0], Hello)
    assert reader.end is None
    bench.turn(1.6)
    assert reader.error.code == Code.ENGINE_LOST and "pings" in reader.error.message


@pytest.mark.parametrize(
    "wrong",
    [
        tokens("a", 3, 1),
        tokens("a", 1, 1),
        Deltas(deltas=[Delta(rid="a", index=0, start=2, tokens=[1], text_from=1, text="x")]),
        Deltas(deltas=[Delta(rid="a", index=0, start=2, tokens=[1, 2], logprobs=[{}])]),
        Deltas(deltas=[Delta(rid="a", index=1 << 16, start=0, tokens=[1])]),
        Deltas(deltas=[Delta(rid="a", index=-1, start=0, tokens=[1])]),
        Deltas(deltas=[Delta(rid="a", index=0, start=1, tokens=[1])]),
        finished("a", 3),
        finished("a", 1),
    ],
)
def test_what_does_not_follow_ends_its_request_and_no_other(wrong: EngineMessage) -> None:
    bench = up()
    reader, other = bench.submit("a"), bench.submit("b")
    bench.hear(Accepted(rid="a"), Accepted(rid="b"), tokens("a", 0, 1, 2), tokens("b", 0, 1))
    sent = bench.hear(wrong)
    assert reader.error.code == Code.INTERNAL and reader.tokens() == [1, 2] and not reader.error.retry_safe
    assert [message.rid for message in sent if isinstance(message, Abort)] == ["a"]
    bench.hear(tokens("a", 2, 3), finished("b", 1))
    assert other.tokens() == [1]


def test_an_engine_that_talks_nonsense_is_left_and_tried_again_later() -> None:
    bench = up()
    reader = bench.submit("a")
    bench.state.receive([b"nonsense"])
    assert bench.turn() == [] and reader.error.code == Code.INTERNAL
    assert bench.turn(1.9) == []
    assert isinstance(bench.turn(0.2)[0], Hello)


def test_without_an_engine_a_request_waits_so_long_and_a_deadline_may_be_sooner() -> None:
    bench = Bench(connect_timeout=10.0)
    patient, hasty = bench.submit("a"), bench.submit("b", deadline=3.0)
    for _ in range(29):
        bench.turn(0.1)
        bench.state.broken("nothing listens")
    assert patient.end is None and hasty.end is None
    bench.turn(0.2)
    assert hasty.error.code == Code.DEADLINE
    for _ in range(100):
        bench.turn(0.1)
        bench.state.broken("nothing listens")
    assert patient.error.code == Code.ENGINE_LOST and patient.error.retry_safe and "nothing listens" in patient.error.message


def test_a_client_that_is_not_welcome_does_not_insist_and_a_new_request_tries_again() -> None:
    bench = Bench()
    reader = bench.submit("a")
    bench.hear(Error(code=Code.UNAUTHENTICATED, message="no token"))
    assert (reader.error.code, reader.error.message) == (Code.UNAUTHENTICATED, "no token")
    assert bench.turn(60.0) == [] and bench.state.connection is None
    again = bench.submit("b")
    assert isinstance(bench.sent[0], Hello)
    bench.hear(welcome())
    assert again.end is None


def test_an_engine_with_too_many_clients_is_asked_again_and_its_reason_is_told() -> None:
    bench = Bench(connect_timeout=1.0)
    reader = bench.submit("a")
    for _ in range(20):
        bench.hear(Error(code=Code.QUEUE_FULL, message="too many sessions"))
        bench.turn(0.1)
    assert reader.error.code == Code.QUEUE_FULL and "too many sessions" in reader.error.message


def test_background_attempts_come_less_and_less_often_down_to_one_in_two_seconds() -> None:
    bench = up()
    attempts = []
    bench.state.broken("gone")
    for _ in range(3000):
        if any(isinstance(message, Hello) for message in bench.turn(0.01)):
            attempts.append(bench.clock.now)
        bench.state.broken("nothing listens")
    pauses = [after - before for before, after in itertools.pairwise(attempts)]
    assert max(pauses) <= 2.05 and pauses[-1] > 1.9 and min(pauses) > 0.04


def test_aborts_and_departures_reach_the_engine_after_a_cut() -> None:
    bench = up()
    aborted, left, kept = (bench.submit(rid) for rid in "abc")
    bench.hear(*(Accepted(rid=rid) for rid in "abc"))
    bench.state.broken("cut")
    bench.state.abort("a")
    bench.state.leave("b")
    bench.turn()
    sent = bench.hear(welcome(resumed=True))
    assert sorted((type(message).__name__, message.rid) for message in sent if isinstance(message, Abort | Attach)) == [
        *[("Abort", "a"), ("Abort", "b"), ("Attach", "a"), ("Attach", "c")]
    ]
    bench.hear(finished("a", 0), finished("b", 0), finished("c", 0))
    assert aborted.end is not None and kept.end is not None and left.end is None


def test_questions_are_asked_again_after_a_cut_and_answered_in_order() -> None:
    bench = up()
    health, stats = Future[Pong](), Future[object]()
    bench.state.ask(Ask(Ping, health))
    bench.state.ask(Ask(Stats, stats))
    bench.state.broken("cut")
    bench.turn()
    ping, _ = bench.hear(welcome(resumed=True))
    assert isinstance(ping, Ping)
    bench.hear(pong(ping.t))
    assert health.result(0).t == ping.t
    bench.hear(GoAway(reason="the engine stops"))
    assert isinstance(stats.exception(0), ServiceError)


def test_closing_ends_everything_and_says_bye_unless_the_session_is_kept() -> None:
    for keep in (False, True):
        bench = up()
        reader = bench.submit("a")
        bench.state.close(keep_session=keep)
        bench.turn()
        assert reader.error.code == Code.CANCELLED
        assert any(isinstance(message, Bye) for message in bench.sent) != keep


def test_a_request_that_breaks_every_connection_does_not_do_so_for_ever() -> None:
    bench = up()
    reader = bench.submit("a")
    for _ in range(20):
        if reader.end is not None:
            break
        bench.state.broken("cut")
        bench.turn()
        bench.hear(welcome(resumed=True))
    assert reader.error.code == Code.ENGINE_LOST and "again and again" in reader.error.message

"""Who may speak, for how long, and for whom."""

from __future__ import annotations

import pytest
from support.service_by_hand import Hand, output

from pagefork import wire
from pagefork.engine_thread import Queued
from pagefork.server.seam import Sent, Timing
from pagefork.server.session import Peers
from pagefork.wire import Code

BAD = [b"no header", b""]


def code(messages: list[object]) -> str:
    [error] = messages
    assert isinstance(error, wire.Error)
    return error.code


@pytest.mark.parametrize("message", [wire.Ping(), wire.Submit(rid="r", text="x"), wire.Stats(), wire.Bye(), wire.Abort(rid="r")])
def test_before_hello_nothing_is_done(message: wire.ClientMessage) -> None:
    hand = Hand()
    assert code(hand.say(b"p", message)) == Code.UNAUTHENTICATED
    assert not hand.gate.added and not hand.gate.asked


def test_a_connection_without_a_principal_shows_the_token() -> None:
    hand = Hand(token="secret")
    for token in (None, "", "secre", "secret "):
        assert code(hand.say(b"p", wire.Hello(token=token), principal=None)) == Code.UNAUTHENTICATED
    [welcome] = hand.say(b"p", wire.Hello(token="secret"), principal=None)
    assert isinstance(welcome, wire.Welcome) and not welcome.resumed


def test_without_a_token_of_the_service_no_token_is_right() -> None:
    assert code(Hand().say(b"p", wire.Hello(token=""), principal=None)) == Code.UNAUTHENTICATED


def test_a_guesser_of_tokens_is_ignored_after_twenty() -> None:
    hand = Hand(token="secret")
    for _ in range(20):
        assert code(hand.say(b"p", wire.Hello(token="guess"), principal=None)) == Code.UNAUTHENTICATED
    assert hand.say(b"p", wire.Hello(token="secret"), principal=None) == []


@pytest.mark.parametrize(("lowest", "highest"), [(2, 9), (0, 0)])
def test_a_client_of_other_versions_is_told_so(lowest: int, highest: int) -> None:
    assert code(Hand().say(b"p", wire.Hello(proto_min=lowest, proto_max=highest))) == Code.VERSION


def test_a_session_is_resumed_with_its_secret_by_its_principal_only() -> None:
    hand = Hand()
    secret = hand.hello().session
    [theirs] = hand.say(b"q", wire.Hello(session=secret), principal="you")
    [guessed] = hand.say(b"s", wire.Hello(session=bytes(16)), principal="you")
    for other in (theirs, guessed):  # whether the secret exists can't be told
        assert not other.resumed and other.session != secret
    [mine] = hand.say(b"t", wire.Hello(session=secret))
    assert mine.resumed and mine.session == secret


def test_a_resumed_session_sends_its_old_connection_away() -> None:
    hand = Hand()
    secret = hand.hello().session
    hand.hello(b"q", session=secret)
    assert [type(message) for message in hand.take(b"p")] == [wire.GoAway]
    assert code(hand.say(b"p", wire.Ping())) == Code.UNAUTHENTICATED


def test_hello_with_its_own_session_once_more_changes_nothing() -> None:
    hand = Hand()
    secret = hand.hello().session
    ticket = hand.open()
    assert hand.hello(session=secret).resumed
    hand.deliver(ticket, output(ticket, 1))
    assert [type(message) for message in hand.take()] == [wire.Deltas]


def test_hello_anew_ends_the_session_that_the_peer_had() -> None:
    hand = Hand(max_sessions=1)
    first = hand.hello().session
    ticket = hand.open()
    for _ in range(50):
        second = hand.hello()
        assert second.session != first and not second.resumed
    assert hand.gate.discarded == [ticket]
    assert not hand.hello(b"p", session=first).resumed


def test_another_principal_on_a_connection_does_not_speak_for_the_session() -> None:
    hand = Hand()
    hand.hello()
    assert code(hand.say(b"p", wire.Ping(), principal="you")) == Code.UNAUTHENTICATED


def test_a_session_too_many_is_refused_until_one_ends() -> None:
    hand = Hand(max_sessions=2)
    hand.hello(b"a")
    hand.hello(b"b")
    [error] = hand.say(b"c", wire.Hello())
    assert error.code == Code.QUEUE_FULL and 100 <= error.retry_after_ms <= 10_000
    hand.say(b"a", wire.Bye())
    hand.hello(b"c")


def test_bye_frees_the_requests_of_a_session() -> None:
    hand = Hand()
    secret = hand.hello().session
    ticket = hand.open()
    assert hand.say(b"p", wire.Bye()) == []
    assert hand.gate.discarded == [ticket]
    assert not hand.hello(session=secret).resumed
    assert hand.stats().requests == 0


def test_twenty_bad_messages_close_a_session_and_its_peer() -> None:
    hand = Hand()
    hand.hello()
    ticket = hand.open()
    for _ in range(19):
        hand.service.receive(b"p", BAD, "me")
    assert {message.code for message in hand.take()} == {Code.INVALID_ARGUMENT}
    assert [type(message) for message in hand.say(b"p", wire.Ping())] == [wire.Pong]
    hand.service.receive(b"p", BAD, "me")
    assert [type(message) for message in hand.take()] == [wire.Error, wire.GoAway]
    assert hand.gate.discarded == [ticket]
    assert hand.say(b"p", wire.Hello()) == []
    assert hand.stats().malformed_frames == 20


def test_a_stranger_is_ignored_after_twenty_bad_messages() -> None:
    hand = Hand()
    for _ in range(25):
        hand.service.receive(b"p", BAD, None)
    assert len(hand.take()) == 20
    assert hand.say(b"p", wire.Hello()) == []


def test_a_blob_where_none_belongs_is_a_bad_message() -> None:
    hand = Hand()
    hand.hello()
    assert code(hand.say(b"p", wire.Ping(), blob=b"")) == Code.INVALID_ARGUMENT
    assert hand.stats().malformed_frames == 1


def test_strangers_and_their_bad_messages_take_no_memory() -> None:
    peers = Peers()
    for number in range(10_000):
        peers.strike(b"once%d" % number)
        while not peers.strike(b"%d" % number):
            pass
        peers.close(b"%d" % number)
    assert len(peers._closed) <= 4096 and len(peers._strangers) <= 1024 and not peers._sessions
    assert peers.is_closed(b"9999") and not peers.is_closed(b"once9999")


def test_a_silent_client_loses_its_lease_and_after_the_grace_its_requests() -> None:
    hand = Hand(Timing(lease=15, grace=5))
    secret = hand.hello().session
    ticket = hand.open()
    hand.pass_time(19.9)
    assert not hand.gate.discarded
    hand.pass_time(0.2)
    assert hand.gate.discarded == [ticket]
    assert isinstance(hand.take()[-1], wire.GoAway)
    assert not hand.hello(session=secret).resumed


def test_any_message_renews_the_lease() -> None:
    hand = Hand()
    hand.hello()
    hand.open()
    for _ in range(10):
        hand.pass_time(14)
        assert [type(message) for message in hand.say(b"p", wire.Ping())] == [wire.Pong]
    assert not hand.gate.discarded


def test_a_client_that_is_back_within_the_grace_keeps_its_stream() -> None:
    """It was silent, as a process that waits for a lock, but its connection was there all the time: nothing was lost."""
    hand = Hand()
    hand.hello()
    ticket = hand.open()
    hand.pass_time(17)
    hand.say(b"p", wire.Ping())
    hand.pass_time(14)
    hand.deliver(ticket, output(ticket, 1))
    assert [type(message) for message in hand.take()] == [wire.Deltas]


def test_an_unreachable_client_has_the_grace_to_come_back() -> None:
    hand = Hand(Timing(grace=5))
    secret = hand.hello().session
    ticket = hand.open()
    hand.state[b"p"] = Sent.GONE
    hand.deliver(ticket, output(ticket, 1))
    hand.pass_time(4.9)
    assert not hand.gate.discarded and hand.hello(b"q", session=secret).resumed
    hand.pass_time(14)
    assert not hand.gate.discarded
    hand.state[b"q"] = Sent.GONE
    hand.say(b"q", wire.Ping())
    hand.pass_time(5.1)
    assert hand.gate.discarded == [ticket]
    assert not hand.hello(b"s", session=secret).resumed


def test_a_peer_that_was_gone_says_hello_before_it_is_heard() -> None:
    """It can't know which messages it lost."""
    hand = Hand()
    secret = hand.hello().session
    hand.state[b"p"] = Sent.GONE
    hand.say(b"p", wire.Ping())
    del hand.state[b"p"]
    assert code(hand.say(b"p", wire.Ping())) == Code.UNAUTHENTICATED
    assert hand.hello(session=secret).resumed


def test_what_a_client_does_not_read_is_bounded() -> None:
    hand = Hand()
    hand.hello()
    hand.state[b"p"] = Sent.FULL
    for number in range(1000):
        hand.say(b"p", wire.Ping(t=number))
    line = next(iter(hand.service._sessions), None)
    assert line is not None and line.line is None  # it counts as gone
    hand.pass_time(6)
    assert hand.stats().sessions == 1  # the one that asks


def test_messages_for_a_slow_peer_come_in_order_once_it_reads() -> None:
    hand = Hand()
    hand.hello()
    ticket = hand.open()
    hand.state[b"p"] = Sent.FULL
    hand.say(b"p", wire.Ping(t=1))
    hand.deliver(ticket, output(ticket, 2))
    hand.say(b"p", wire.Ping(t=2))
    hand.deliver(ticket, output(ticket, 3, finish="stop"))
    del hand.state[b"p"]
    hand.pass_time(0.1)
    kinds = [type(message) for message in hand.take()]
    assert kinds == [wire.Pong, wire.Pong, wire.Deltas, wire.Finished]


def test_a_message_does_not_overtake_those_that_waited() -> None:
    hand = Hand()
    hand.hello()
    hand.state[b"p"] = Sent.FULL
    hand.say(b"p", wire.Ping(t=1))
    hand.state[b"p"] = Sent.OK
    assert [pong.t for pong in hand.say(b"p", wire.Ping(t=2))] == [1, 2]


def test_the_log_never_has_the_secret() -> None:
    hand = Hand()
    secret = hand.hello().session
    hand.submit()
    hand.deliver(hand.gate.added[0][0], Queued(3))
    hand.hello(b"q", session=secret)
    hand.say(b"q", wire.Bye())
    assert {event for event, _ in hand.logged} >= {"session.open", "session.resume", "session.close", "request.accepted"}
    assert all(secret.hex()[:8] not in str(fields) and str(secret) not in str(fields) for _, fields in hand.logged)

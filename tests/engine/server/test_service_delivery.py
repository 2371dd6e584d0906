"""However credit, slow peers and new connections mix: a client puts together what the engine made, no more and no less."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.service_by_hand import Hand, output

from pagefork import wire
from pagefork.engine_thread import Queued
from pagefork.outputs import Logprob
from pagefork.server.seam import Sent
from pagefork.wire import Code, Have


def ready(**limits: int) -> Hand:
    hand = Hand(**limits)
    hand.hello()
    return hand


def tokens(messages: list[Any]) -> list[list[int]]:
    return [delta.tokens for message in messages if isinstance(message, wire.Deltas) for delta in message.deltas]


def test_no_token_at_or_beyond_the_credit_is_sent() -> None:
    hand = ready()
    ticket = hand.open(credit=2)
    hand.deliver(ticket, output(ticket, [5, 1]))
    assert tokens(hand.take()) == [[0, 1], [0]]
    assert tokens(hand.say(b"p", wire.Credit(rid="r", upto=4))) == [[2, 3]]
    assert hand.say(b"p", wire.Credit(rid="r", upto=3)) == []  # it never goes back
    hand.deliver(ticket, output(ticket, [9, 6]))
    assert tokens(hand.take()) == [[1, 2, 3]]


def test_text_comes_with_its_tokens_and_not_before_them() -> None:
    hand = ready()
    ticket = hand.open(credit=0)
    for count in (1, 2, 4):
        hand.deliver(ticket, output(ticket, count))
    texts = []
    for upto in (1, 2, 3, 4):
        [deltas] = hand.say(b"p", wire.Credit(rid="r", upto=upto))
        texts.append(deltas.deltas[0].text)
    assert texts == ["<0>", "<1>", "", "<2><3>"]


def test_text_that_was_held_back_comes_with_the_end() -> None:
    hand = ready()
    ticket = hand.open()
    early = output(ticket, 3)
    early.outputs[0].text = "<0>"
    hand.deliver(ticket, early)
    hand.take()
    hand.deliver(ticket, output(ticket, 3, finish="length"))
    deltas, finished = hand.take()
    [delta] = deltas.deltas
    assert (delta.start, delta.tokens, delta.text_from, delta.text) == (3, [], 3, "<1><2>")
    assert (finished.outputs[0].start, finished.outputs[0].text_from, finished.outputs[0].text) == (3, 9, "")


def test_what_is_not_streamed_comes_with_finished_and_needs_no_credit() -> None:
    hand = ready()
    ticket = hand.open(stream=False, credit=0)
    hand.deliver(ticket, output(ticket, [2, 1], logprobs=True))
    assert hand.take() == []
    hand.deliver(ticket, output(ticket, [3, 1], finish="stop", logprobs=True))
    [finished] = hand.take()
    first, second = finished.outputs
    assert (first.start, first.tokens, first.text, second.tokens) == (0, [0, 1, 2], "<0><1><2>", [0])
    assert first.logprobs == [{token: Logprob(-1.0, 1, f"<{token}>")} for token in range(3)]
    assert finished.usage.completion_tokens == 4 and finished.error is None


def test_deltas_of_one_session_come_together() -> None:
    hand = ready()
    tickets = [hand.open(f"r{number}") for number in range(5)]
    hand.service.deliver({ticket: output(ticket, 1) for ticket in tickets})
    [deltas] = hand.take()
    assert [delta.rid for delta in deltas.deltas] == [f"r{number}" for number in range(5)]


@pytest.mark.parametrize("logprobs", [False, True])
def test_much_output_comes_in_messages_of_bounded_size(logprobs: bool) -> None:
    hand = ready()
    tickets = [hand.open(f"r{number}", credit=0) for number in range(3)]
    whole = {ticket: output(ticket, [4_000 if logprobs else 100_000, 10], logprobs=logprobs, finish="stop") for ticket in tickets}
    hand.service.deliver(whole)
    hand.sizes.clear()
    got: dict[tuple[str, int], tuple[list[int], str]] = {}
    for number in range(3):
        messages = hand.say(b"p", wire.Credit(rid=f"r{number}", upto=1 << 20))
        assert len(messages) <= 5  # others have their turn
        hand.pass_time(0.5)
        for message in messages + hand.take():
            for delta in message.deltas if isinstance(message, wire.Deltas) else []:
                before = got.get((delta.rid, delta.index), ([], ""))
                assert (delta.start, delta.text_from) == (len(before[0]), len(before[1]))
                assert not logprobs or [*map(next, map(iter, delta.logprobs))] == delta.tokens
                got[delta.rid, delta.index] = before[0] + delta.tokens, before[1] + delta.text
    assert max(hand.sizes) < 300 << 10
    for index, expected in enumerate(whole[tickets[0]].outputs):
        assert {got[f"r{number}", index][0] == expected.token_ids for number in range(3)} == {True}
        assert {got[f"r{number}", index][1] == expected.text for number in range(3)} == {True}


def test_what_a_full_peer_did_not_take_comes_whole_when_it_reads() -> None:
    hand = ready()
    ticket = hand.open()
    hand.state[b"p"] = Sent.FULL
    hand.deliver(ticket, output(ticket, 30_000, finish="stop"))  # several pieces in one message
    hand.state[b"p"] = Sent.OK
    hand.pass_time(0.1)
    assert [token for piece in tokens(hand.take()) for token in piece] == [*range(30_000)]


def test_a_peer_that_stays_full_is_tried_less_often_but_a_few_times_a_second() -> None:
    hand = ready()
    ticket = hand.open()
    hand.state[b"p"] = Sent.FULL
    hand.attempts.clear()
    for count in range(1, 201):  # a step every 10 ms has something for it
        hand.deliver(ticket, output(ticket, count))
        hand.pass_time(0.01)
    gaps = [later - earlier for earlier, later in pairwise(dict.fromkeys(hand.attempts))]
    assert 5 < len(gaps) < 15 and max(gaps) < 0.35


def test_an_end_that_a_full_peer_did_not_take_comes_when_it_reads() -> None:
    hand = ready()
    ticket = hand.open(stream=False)
    hand.state[b"p"] = Sent.FULL
    hand.deliver(ticket, output(ticket, 3, finish="stop"))
    hand.state[b"p"] = Sent.OK
    hand.pass_time(0.1)
    [finished] = hand.take()
    assert finished.outputs[0].tokens == [0, 1, 2]


def test_a_new_connection_gets_nothing_before_it_says_what_it_has() -> None:
    hand = ready()
    secret = hand.hello().session
    ticket = hand.open()
    hand.deliver(ticket, output(ticket, 3))
    hand.take()
    hand.hello(b"q", session=secret)
    hand.deliver(ticket, output(ticket, 5))
    assert hand.take(b"q") == []
    accepted, deltas = hand.say(b"q", wire.Attach(rid="r", have=[Have(2, 6)], credit=4))
    assert accepted == wire.Accepted(rid="r", attached=True)
    assert (deltas.deltas[0].start, deltas.deltas[0].tokens) == (2, [2, 3])


def test_text_may_be_owed_to_a_client_that_has_more_tokens_than_credit() -> None:
    hand = ready()
    ticket = hand.open(credit=0)
    for count in (2, 4, 6):
        hand.deliver(ticket, output(ticket, count))
    [_, deltas] = hand.say(b"p", wire.Attach(rid="r", have=[Have(4, 0)], credit=3))
    assert (deltas.deltas[0].tokens, deltas.deltas[0].text) == ([], "<0><1>")
    [deltas] = hand.say(b"p", wire.Credit(rid="r", upto=6))
    assert (deltas.deltas[0].start, deltas.deltas[0].tokens, deltas.deltas[0].text) == (4, [4, 5], "<2><3><4><5>")


@pytest.mark.parametrize("have", [[Have(3, 0)], [Have(0, 7)], [Have(), Have(1, 0)]])
def test_a_client_cannot_have_what_there_is_not(have: list[Have]) -> None:
    hand = ready()
    ticket = hand.open()
    hand.deliver(ticket, output(ticket, 2))
    hand.take()
    [error] = hand.say(b"p", wire.Attach(rid="r", have=have, credit=9))
    assert (error.code, error.rid) == (Code.INVALID_ARGUMENT, "r")
    hand.deliver(ticket, output(ticket, 3))
    assert tokens(hand.take()) == [[2]]  # nothing was changed


def test_another_sessions_request_is_unknown() -> None:
    hand = ready()
    hand.open()
    hand.hello(b"q")
    theirs = hand.say(b"q", wire.Attach(rid="r"))
    nobodys = hand.say(b"q", wire.Attach(rid="never"))
    assert theirs[0].message.replace("'r'", "'never'") == nobodys[0].message
    assert {error.code for error in theirs + nobodys} == {Code.INVALID_ARGUMENT}


def test_a_kept_request_is_sent_again_also_where_there_is_no_room_for_new_ones() -> None:
    hand = ready(max_requests=1)
    ticket = hand.open()
    hand.deliver(ticket, output(ticket, 1, finish="stop"))
    hand.take()
    hand.open("other")
    assert [type(message) for message in hand.say(b"p", wire.Attach(rid="r", credit=9))] == [
        wire.Accepted,
        wire.Deltas,
        wire.Finished,
    ]
    [error] = hand.submit("new")
    assert error.code == Code.QUEUE_FULL


class Streams(RuleBasedStateMachine):
    """Two requests, an engine that makes tokens, and a client that believes only what follows from what it has."""

    rids = ("a", "b")

    @initialize(n=st.integers(1, 3), credit=st.integers(0, 4), logprobs=st.booleans(), stream=st.booleans())
    def start(self, n: int, credit: int, logprobs: bool, stream: bool) -> None:
        self.hand = Hand()
        self.peers = 0
        self.peer = b"p0"
        self.secret = self.hand.hello(self.peer).session
        self.n, self.logprobs = n, logprobs
        self.stream = {"a": True, "b": stream}
        self.upto = dict.fromkeys(self.rids, credit)
        self.submits = {
            rid: wire.encode(wire.Submit(rid=rid, credit=credit, stream=self.stream[rid]), wire.encode_tokens([1]))
            for rid in self.rids
        }
        self.tickets = {}
        for rid in self.rids:
            self.hand.service.receive(self.peer, self.submits[rid], "me")
            self.tickets[rid] = self.hand.gate.added[-1][0]
            self.hand.deliver(self.tickets[rid], Queued(0))
        self.made = {rid: [0] * n for rid in self.rids}
        self.shown = {rid: [0] * n for rid in self.rids}  # characters: text lags behind
        self.over = dict.fromkeys(self.rids, False)
        self.have = {rid: [([], "", []) for _ in range(n)] for rid in self.rids}
        self.finals = dict.fromkeys(self.rids, 0)
        self.attached = True

    def _output(self, rid: str, finish: str | None) -> Any:
        made = output(self.tickets[rid], self.made[rid], logprobs=self.logprobs, finish=finish)
        for index, one in enumerate(made.outputs):
            self.shown[rid][index] = len(one.text) if finish else max(self.shown[rid][index], len(one.text) - self.lag)
            one.text = one.text[: self.shown[rid][index]]
        return made

    @rule(
        rid=st.sampled_from(rids),
        grow=st.lists(st.integers(0, 5), min_size=3, max_size=3),
        lag=st.integers(0, 7),
        end=st.booleans(),
    )
    def engine(self, rid: str, grow: list[int], lag: int, end: bool) -> None:
        if self.over[rid]:
            return
        self.lag = lag
        self.made[rid] = [made + more for made, more in zip(self.made[rid], grow, strict=False)]
        self.over[rid] = end
        self.hand.deliver(self.tickets[rid], self._output(rid, "stop" if end else None))

    @rule(rid=st.sampled_from(rids), more=st.integers(0, 9))
    def credit(self, rid: str, more: int) -> None:
        if self.attached:
            self.upto[rid] += more
            self._say(wire.Credit(rid=rid, upto=self.upto[rid]))

    @rule(state=st.sampled_from([Sent.FULL, Sent.OK]))
    def reads(self, state: Sent) -> None:
        self.hand.state[self.peer] = state

    @rule(lost=st.booleans())
    def reconnect(self, lost: bool) -> None:
        """What is on its way is lost with the connection, whether that is noticed or not."""
        if lost:
            self.hand.state[self.peer] = Sent.GONE
            self._say(wire.Ping())
        else:
            self.hand.take(self.peer)
        self.peers += 1
        self.peer = b"p%d" % self.peers
        self.secret, secret = self.hand.hello(self.peer, session=self.secret).session, self.secret
        assert self.secret == secret
        self.attached = False

    @precondition(lambda self: not self.attached)
    @rule(forget=st.booleans())
    def attach(self, forget: bool) -> None:
        """Go on; a client that lost its memory begins anew."""
        for rid in self.rids:
            if self.finals[rid]:
                continue
            if forget:
                self.have[rid] = [([], "", []) for _ in range(self.n)]
            have = [Have(len(one[0]), len(one[1])) for one in self.have[rid]]
            self._say(wire.Attach(rid=rid, have=have, credit=self.upto[rid]))
        self.attached = True

    @rule(rid=st.sampled_from(rids))
    def submit_again(self, rid: str) -> None:
        if self.attached and not self.finals[rid]:
            self.client()
            if not self.finals[rid]:
                self.have[rid] = [([], "", []) for _ in range(self.n)]
                self.hand.service.receive(self.peer, self.submits[rid], "me")

    @rule()
    def client(self) -> None:
        """It reads what has come."""
        for message in self.hand.take(self.peer):
            if isinstance(message, wire.Deltas):
                for delta in message.deltas:
                    assert self.stream[delta.rid] and not self.finals[delta.rid] and (delta.tokens or delta.text)
                    assert delta.start + len(delta.tokens) <= self.upto[delta.rid]
                    self._grow(delta.rid, delta)
            elif isinstance(message, wire.Finished):
                self.finals[message.rid] += 1
                assert self.over[message.rid] and message.error is None
                for final in message.outputs:
                    self._grow(message.rid, final)
                self._check_whole(message)

    def _say(self, message: wire.ClientMessage) -> None:
        self.hand.service.receive(self.peer, wire.encode(message), "me")

    def _grow(self, rid: str, part: Any) -> None:
        ids, text, logprobs = self.have[rid][part.index]
        assert (part.start, part.text_from) == (len(ids), len(text))
        assert part.logprobs is None or len(part.logprobs) == len(part.tokens)
        self.have[rid][part.index] = ids + part.tokens, text + part.text, logprobs + (part.logprobs or [])

    def _check_whole(self, message: wire.Finished) -> None:
        made = output(self.tickets[message.rid], self.made[message.rid], logprobs=self.logprobs)
        for one, (ids, text, logprobs) in zip(made.outputs, self.have[message.rid], strict=True):
            assert (one.token_ids, one.text, one.logprobs or []) == (ids, text, logprobs)
        assert message.usage.completion_tokens == sum(self.made[message.rid])

    @invariant()
    def what_came_is_what_was_made(self) -> None:
        for rid in self.rids if hasattr(self, "hand") else ():
            for index, (ids, text, _) in enumerate(self.have[rid]):
                assert ids == [*range(len(ids))] and len(ids) <= self.made[rid][index]
                assert "".join(f"<{token}>" for token in range(self.made[rid][index])).startswith(text)
            assert self.finals[rid] <= 1

    def teardown(self) -> None:
        """At last everybody reads: each request ends once, and whole."""
        if not hasattr(self, "hand"):
            return
        self.hand.state.clear()
        if not self.attached:
            self.attach(False)
        for rid in self.rids:
            self.engine(rid, [1, 1, 1], 0, True)
            self._say(wire.Credit(rid=rid, upto=1 << 20))
            self.upto[rid] = 1 << 20
        self.hand.pass_time(0.1)
        self.client()
        self.what_came_is_what_was_made()
        assert self.finals == dict.fromkeys(self.rids, 1)


TestStreams = Streams.TestCase
TestStreams.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)

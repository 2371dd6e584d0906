"""What clients of a served engine do to it and to each other: they die, read nothing, come back, ask twice, intrude."""

from __future__ import annotations

import signal

import pytest
from support.dealer import Dealer, eventually, grow, probe, resident
from support.served_requests import LONG, PROMPT, SHORT, idle, python, streaming, tokens_of
from support.serving_process import GONE_WITHIN, configured, serving

from pagefork import LLM, SamplingParams, wire
from pagefork.server.launch import Served

CLIENT = """
import ctypes, sys, time
from pagefork import Client, SamplingParams
client = Client(sys.argv[1])
params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
streams = [client.stream([5, 6, 7, 8], params) for _ in range(2)]
for stream in streams:
    next(iter(stream))
print("streaming", flush=True)
if sys.argv[2] == "wedged":
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock
time.sleep(60)
"""


@pytest.mark.parametrize("way", ["killed", "stopped", "wedged"])
def test_a_client_that_is_lost_gives_its_blocks_back(served: Served, way: str) -> None:
    client = python(CLIENT, served.endpoint, way)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "streaming\n"
        if way == "killed":
            client.kill()
        elif way == "stopped":
            client.send_signal(signal.SIGSTOP)
        with Dealer(served.endpoint) as dealer:
            dealer.hello()
            eventually(lambda: idle(dealer), GONE_WITHIN, "a lost client's blocks are freed")
            eventually(lambda: dealer.stats().service.sessions == 1, GONE_WITHIN, "its session is forgotten")
    finally:
        client.kill()
        client.wait()
        client.stdin.close() if client.stdin else None
        client.stdout.close() if client.stdout else None


def test_slow_readers_slow_nobody_down_but_themselves(served: Served, demo: LLM) -> None:
    """16 of them ask for much, give credit for all of it and read nothing, or give none; what others get is complete."""
    params = SamplingParams(n=2, temperature=0.9, max_tokens=50, seed=3, ignore_eos=True)
    expected = tokens_of(demo, [PROMPT], [params])[0]
    slow = [Dealer(served.endpoint, read_hwm=1) for _ in range(16)]
    try:
        for number, dealer in enumerate(slow):
            dealer.hello()
            dealer.submit(PROMPT, LONG.replace(max_tokens=80, logprobs=2), credit=2**31 - 1 if number % 2 else 0)
        before = resident(served.pid)
        for _ in range(4):
            with Dealer(served.endpoint) as dealer:
                dealer.hello()
                assert dealer.finish(dealer.submit(PROMPT, params))[1] == expected
            for other in slow:
                other.ping()
        assert resident(served.pid) - before < 32 << 20
    finally:
        for dealer in slow:
            dealer.socket.close(0)


def test_a_client_comes_back_over_another_connection_and_misses_nothing(served: Served, demo: LLM) -> None:
    params = SHORT.replace(max_tokens=120)
    tokens: dict[int, list[int]] = {}
    with Dealer(served.endpoint) as first:
        session = first.hello().session
        rid = first.submit(PROMPT, params, credit=10)
        while len(tokens.get(0, ())) < 10:
            for delta in first.get(wire.Deltas).deltas:
                grow(tokens, delta)
        assert len(tokens[0]) == 10, "no more than there is credit for"
    with Dealer(served.endpoint) as second:
        assert second.hello(session).resumed
        second.send(wire.Attach(rid=rid, have=[wire.Have(10, 0)], credit=1000))
        while not isinstance(message := second.get(wire.Deltas, wire.Finished), wire.Finished):
            for delta in message.deltas:
                grow(tokens, delta)
        grow(tokens, message.outputs[0])
    assert [tokens[0]] == tokens_of(demo, [PROMPT], [params])[0]


def test_a_message_that_comes_twice_does_nothing_twice(served: Served) -> None:
    with Dealer(served.endpoint) as dealer:
        dealer.hello()
        accepted = dealer.stats().service.accepted
        submit = wire.Submit(rid="twice", params=wire.encode_params(SHORT), credit=100, stream=False)
        for _ in range(3):
            dealer.send(submit, wire.encode_tokens(PROMPT))
        first = dealer.get(wire.Finished)
        dealer.send(submit, wire.encode_tokens(PROMPT))
        again = dealer.get(wire.Finished)
        assert (first.rid, first.outputs, first.usage) == (again.rid, again.outputs, again.usage)
        assert dealer.stats().service.accepted == accepted + 1, "it ran once"
        dealer.send(submit, wire.encode_tokens([*PROMPT, 9]))
        assert dealer.get(wire.Error).code == wire.Code.DUPLICATE_MISMATCH


def test_a_foreign_session_is_nobodys(served: Served) -> None:
    """Whoever names a session that is not there gets a new one, and nothing of others' requests."""
    with Dealer(served.endpoint) as owner, Dealer(served.endpoint) as other:
        session = owner.hello().session
        (rid,) = streaming(owner)
        welcome = other.hello(session=bytes([session[0] ^ 1]) + session[1:])
        assert not welcome.resumed and welcome.session != session
        other.send(wire.Attach(rid=rid, credit=100))
        assert other.get(wire.Error).rid == rid
        other.send(wire.Abort(rid=rid))
        assert owner.finish(owner.submit(PROMPT, SHORT))[0].error is None
        owner.send(wire.Abort(rid=rid))
        owner.get(wire.Finished, rid=rid)


def test_whoever_shows_the_wrong_token_gets_nothing_on_tcp() -> None:
    with serving(configured(bind="tcp://127.0.0.1:0")) as engine:
        for token in (None, "", "wrong", "x" * 256):
            with Dealer(engine.endpoint, token) as dealer:
                dealer.send(wire.Hello(token=token))
                assert dealer.get(wire.Error, wire.Welcome).code == wire.Code.UNAUTHENTICATED
                dealer.submit(PROMPT, SHORT)
                assert dealer.get(wire.Error, wire.Accepted).code == wire.Code.UNAUTHENTICATED
        assert probe(engine.endpoint, engine.token) < 1.0

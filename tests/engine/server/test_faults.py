"""A served engine in a process of its own, and what can happen to it and to its clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from support.dealer import Dealer, alive, eventually, grow, probe, resident
from support.serving_process import GONE_WITHIN, configured, serving

from pagefork import LLM, SamplingParams, wire
from pagefork.limits import Limits
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams
from pagefork.server.launch import Served

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7, 8]
LIMITS = Limits(
    max_sessions=200, max_requests=100, max_reserved_tokens=4000, max_text_bytes=300, max_n=3, max_beam_width=4,
    max_num_simulations=5, max_tree_depth=4, max_rollout_tokens=3, max_leaf_batch_size=2, max_candidates=4, max_stop=2,
    max_stop_bytes=8, max_listed=3, max_logprobs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(configured(limits=LIMITS)) as engine:
        yield engine


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that uses it, the served engine holds nothing and serves a probe within a second."""
    yield
    if "served" in request.fixturenames:
        engine = request.getfixturevalue("served")
        with Dealer(engine.endpoint) as dealer:
            dealer.hello()
            eventually(lambda: idle(dealer), GONE_WITHIN + 5.0, "everything is let go of")
            dealer.bye()
        assert probe(engine.endpoint) < 1.0


def idle(dealer: Dealer) -> bool:
    stats = dealer.stats()
    engine, service = stats.engine, stats.service
    return (engine.num_running, engine.num_waiting, service.requests, service.reserved_tokens) == (0, 0, 0, 0) and (
        engine.free_blocks == engine.num_blocks
    )


def ended(dealer: Dealer, rids: Sequence[str], seconds: float) -> dict[str, wire.Finished]:
    """The terminals of several requests, which come in any order; every request has one, and parts that follow each other."""
    found: dict[str, wire.Finished] = {}
    tokens: dict[str, dict[int, list[int]]] = {rid: {} for rid in rids}
    deadline = time.monotonic() + seconds
    while len(found) < len(rids) and (got := dealer.next(max(0.0, deadline - time.monotonic()))) is not None:
        message = got[0]
        for part in message.deltas if isinstance(message, wire.Deltas) else ():
            grow(tokens[part.rid], part)
        if isinstance(message, wire.Finished):
            assert message.rid not in found, "a second terminal"
            found[message.rid] = message
            for final in message.outputs:
                grow(tokens[message.rid], final)
            assert sum(map(len, tokens[message.rid].values())) == message.usage.completion_tokens
    assert len(found) == len(rids), f"no terminal for {set(rids) - found.keys()}"
    return found


def streaming(dealer: Dealer, count: int = 1, params: SamplingParams = LONG) -> list[str]:
    """Requests of which tokens have come."""
    rids = [dealer.submit(PROMPT, params) for _ in range(count)]
    waiting = set(rids)
    while waiting:
        waiting -= {delta.rid for delta in dealer.get(wire.Deltas).deltas}
    return rids


# The engine dies


def _kill_the_engine() -> None:
    from pagefork import Client, ServiceError

    with serving() as engine, Client(engine.endpoint) as client:
        streams = [client.stream(PROMPT, LONG) for _ in range(4)]
        for stream in streams:
            next(iter(stream))
        began = time.monotonic()
        os.kill(engine.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(ServiceError) as caught:
                stream.result()
            assert caught.value.code == wire.Code.ENGINE_LOST
            assert not caught.value.retry_safe, "tokens had come"
        assert time.monotonic() - began < 2.5
        eventually(lambda: not _group(engine.pid), 2.0, "no process of the engine's is left")


def _group(leader: int) -> list[int]:
    """The processes of a group that are alive."""
    found = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [int(pid) for pid, group, state in rows if int(group) == leader and not state.startswith("Z")]


def test_streams_of_an_engine_that_is_killed_end_with_engine_lost() -> None:
    _kill_the_engine()


@pytest.mark.long
def test_streams_of_an_engine_that_is_killed_end_with_engine_lost_every_time() -> None:
    for _ in range(300):
        _kill_the_engine()


PARENT = """
import sys
from support.serving_process import serving
with serving() as engine:
    print(engine.pid, engine.endpoint, flush=True)
    sys.stdin.read()
"""


def _kill_the_parent() -> None:
    parent = _python(PARENT)
    assert parent.stdout is not None
    pid, endpoint = parent.stdout.readline().split()
    with Dealer(endpoint) as dealer:
        dealer.hello()
        streaming(dealer)
        parent.kill()
        parent.wait()
        eventually(lambda: not alive(int(pid)), 5.0, "the engine ends after its parent")
    assert not _group(int(pid))
    parent.stdout.close()


def _python(source: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(source), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.path.abspath("tests")},  # noqa: PTH100
    )


def test_an_engine_ends_when_its_parent_is_killed() -> None:
    _kill_the_parent()


@pytest.mark.long
def test_an_engine_ends_when_its_parent_is_killed_every_time() -> None:
    for _ in range(100):
        _kill_the_parent()


def _terminate() -> None:
    """Half of the requests wait for their turn when SIGTERM comes."""
    with serving(configured({"max_num_seqs": 4})) as engine, Dealer(engine.endpoint) as dealer:
        dealer.hello()
        rids = [dealer.submit(PROMPT, LONG.replace(max_tokens=60), stream=n % 2 == 0) for n in range(8)]
        for _ in rids:
            dealer.get(wire.Accepted)
        engine.terminate()
        late = ""
        while not late.startswith("refused"):  # the signal may take its time
            late = dealer.submit(PROMPT, SHORT)
            rids.append(late)
            while (got := dealer.next()) is not None:
                if isinstance(got[0], wire.Error):
                    assert (got[0].rid, got[0].code) == (late, wire.Code.DRAINING)
                    rids.remove(late)
                    late = "refused"
                    break
                if isinstance(got[0], wire.Accepted):
                    break
        found = dict.fromkeys(rids, 0)
        while sum(found.values()) < len(rids):
            finished = dealer.get(wire.Finished)
            found[finished.rid] += 1
            assert finished.error is None
        dealer.get(wire.GoAway)
        assert engine.stop() == 0
        assert set(found.values()) == {1}


def test_sigterm_loses_no_accepted_request() -> None:
    _terminate()


@pytest.mark.long
def test_sigterm_loses_no_accepted_request_ever() -> None:
    for _ in range(100):
        _terminate()


# Clients die

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
    client = _python(CLIENT, served.endpoint, way)
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


# Messages that are wrong


def sent_params(**fields: Any) -> msgspec.Raw:
    """Parameters as a client could send them, whatever our own classes think of them."""
    return msgspec.Raw(msgspec.msgpack.encode({"max_tokens": 1, **fields}))


LISTED = [1, 2, 3]
AT_THE_LIMIT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "n": ({"type": "sampling", "n": 3}, {"n": 4}),
    "best_of": ({"type": "sampling", "best_of": 3}, {"best_of": 4}),
    "n of beams": ({"type": "beam", "beam_width": 4, "n": 3}, {"n": 4}),
    "beam_width": ({"type": "beam", "beam_width": 4}, {"beam_width": 5}),
    "num_simulations": (
        {"type": "mcts", "num_simulations": 5, "top_k": 2, "leaf_batch_size": 1, "max_depth": 2},
        {"num_simulations": 6},
    ),
    "max_depth": ({"type": "mcts", "num_simulations": 2, "top_k": 2, "leaf_batch_size": 1, "max_depth": 4}, {"max_depth": 5}),
    "rollout_tokens": (
        {"type": "mcts", "num_simulations": 2, "top_k": 2, "leaf_batch_size": 1, "max_depth": 1, "rollout_tokens": 3},
        {"rollout_tokens": 4},
    ),
    "leaf_batch_size": (
        {"type": "mcts", "num_simulations": 2, "top_k": 2, "max_depth": 1, "leaf_batch_size": 2},
        {"leaf_batch_size": 3},
    ),
    "top_k": ({"type": "contrastive", "top_k": 4}, {"top_k": 5}),
    "stop": ({"type": "sampling", "stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}),
    "a stop text": ({"type": "sampling", "stop": ["é" * 4]}, {"stop": ["é" * 4 + "a"]}),
    "a bad word": ({"type": "sampling", "bad_words": ["a" * 8]}, {"bad_words": ["a" * 9]}),
    "stop_token_ids": ({"type": "sampling", "stop_token_ids": LISTED}, {"stop_token_ids": [*LISTED, 4]}),
    "bad_words": ({"type": "sampling", "bad_words": ["a", "b", "c"]}, {"bad_words": ["a", "b", "c", "d"]}),
    "allowed_token_ids": ({"type": "sampling", "allowed_token_ids": LISTED}, {"allowed_token_ids": [*LISTED, 4]}),
    "logit_bias": (
        {"type": "sampling", "logit_bias": dict.fromkeys(LISTED, 1.0)},
        {"logit_bias": dict.fromkeys([*LISTED, 4], 1.0)},
    ),
    "logprobs": ({"type": "sampling", "logprobs": 2}, {"logprobs": 3}),
    "the whole vocabulary": ({"type": "sampling", "logprobs": 2}, {"logprobs": -1}),
    "prompt_logprobs": ({"type": "sampling", "prompt_logprobs": 2}, {"prompt_logprobs": 3}),
}


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_a_parameter_at_its_limit_is_served_and_one_past_it_is_refused_without_a_step(served: Served, name: str) -> None:
    fields, past = AT_THE_LIMIT[name]
    with Dealer(served.endpoint) as dealer:
        dealer.hello()
        dealer.send(wire.Submit(rid="at", params=sent_params(**fields)), wire.encode_tokens(PROMPT))
        dealer.send(wire.Credit(rid="at", upto=99))
        assert dealer.finish("at")[0].error is None
        steps = dealer.stats().engine.steps
        dealer.send(wire.Submit(rid="past", params=sent_params(**fields | past), credit=99), wire.encode_tokens(PROMPT))
        assert dealer.get(wire.Error, rid="past").code == wire.Code.TOO_LARGE
        assert dealer.stats().engine.steps == steps


def test_prompts_at_their_limits_are_served_and_those_past_them_are_refused(served: Served) -> None:
    one = SamplingParams(max_tokens=1, temperature=0)
    with Dealer(served.endpoint) as dealer:
        welcome = dealer.hello()
        assert welcome.limits == LIMITS.asdict()
        for prompt in ("é" * 150, [1] * (welcome.max_model_len - 1), [welcome.vocab_size - 1]):
            assert dealer.finish(dealer.submit(prompt, one))[0].error is None
        steps = dealer.stats().engine.steps
        refused = {
            "text": (dealer.submit("é" * 150 + "a", one), wire.Code.TOO_LARGE),
            "length": (dealer.submit([1] * welcome.max_model_len, one), wire.Code.INVALID_ARGUMENT),
            "vocabulary": (dealer.submit([welcome.vocab_size], one), wire.Code.INVALID_ARGUMENT),
            "nothing": (dealer.submit([], one), wire.Code.INVALID_ARGUMENT),
            "reserved": (dealer.submit([1] * 4001, one), wire.Code.TOO_LARGE),
        }
        errors = {error.rid: error for error in (dealer.get(wire.Error) for _ in refused)}
        for name, (rid, code) in refused.items():
            error = errors[rid]
            assert error.code == code or (name == "reserved" and error.code == wire.Code.QUEUE_FULL), f"{name}: {error}"
        assert dealer.stats().engine.steps == steps


def test_requests_past_the_queue_are_refused_and_come_in_when_others_are_done(served: Served) -> None:
    with Dealer(served.endpoint, read_hwm=10_000) as dealer:
        dealer.hello()
        rids = [dealer.submit(PROMPT, LONG) for _ in range(LIMITS.max_requests)]
        for _ in rids:
            dealer.get(wire.Accepted)
        late = dealer.submit(PROMPT, SHORT)
        error = dealer.get(wire.Error)
        assert (error.rid, error.code) == (late, wire.Code.QUEUE_FULL)
        assert error.retry_after_ms is not None and error.retry_after_ms > 0
        for rid in rids:
            dealer.send(wire.Abort(rid=rid))
        for _ in rids:
            finished = dealer.get(wire.Finished)
            assert finished.error is not None and finished.error.code == wire.Code.CANCELLED
        assert dealer.finish(dealer.submit(PROMPT, SHORT, rid=late))[0].error is None


def test_a_session_past_the_limit_is_refused_and_others_go_on() -> None:
    with serving(configured(limits=Limits(max_sessions=3))) as engine:
        dealers = [Dealer(engine.endpoint) for _ in range(4)]
        for dealer in dealers[:3]:
            dealer.hello()
        dealers[3].send(wire.Hello())
        assert dealers[3].get(wire.Error, wire.GoAway, wire.Welcome).__class__ is not wire.Welcome
        assert dealers[0].finish(dealers[0].submit(PROMPT, SHORT))[0].error is None
        dealers[0].send(wire.Bye())
        eventually(lambda: _enters(dealers[3]), 5.0, "there is room again")
        for dealer in dealers:
            dealer.socket.close(0)


def _enters(dealer: Dealer) -> bool:
    dealer.send(wire.Hello())
    return isinstance(dealer.get(wire.Error, wire.GoAway, wire.Welcome), wire.Welcome)


def test_a_request_that_computes_more_than_it_may_fails_alone() -> None:
    with serving(configured(limits=Limits(max_forward_tokens=50))) as engine, Dealer(engine.endpoint) as dealer:
        dealer.hello()
        others = [dealer.submit(PROMPT, SHORT) for _ in range(3)]
        greedy = dealer.submit(PROMPT, LONG)
        found = ended(dealer, [*others, greedy], 30.0)
        assert found[greedy].error is not None and found[greedy].error.code == wire.Code.BUDGET_EXCEEDED
        assert all(found[rid].error is None for rid in others)


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


def test_whoever_shows_the_wrong_token_gets_nothing_on_tcp() -> None:
    with serving(configured(bind="tcp://127.0.0.1:0")) as engine:
        for token in (None, "", "wrong", "x" * 256):
            with Dealer(engine.endpoint, token) as dealer:
                dealer.send(wire.Hello(token=token))
                assert dealer.get(wire.Error, wire.Welcome).code == wire.Code.UNAUTHENTICATED
                dealer.submit(PROMPT, SHORT)
                assert dealer.get(wire.Error, wire.Accepted).code == wire.Code.UNAUTHENTICATED
        assert probe(engine.endpoint, engine.token) < 1.0


# Many clients

STRATEGIES: list[CommonParams] = [
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(temperature=0, max_tokens=12, logprobs=1),
    SamplingParams(seed=2, n=3, max_tokens=8),
    SamplingParams(seed=3, n=2, best_of=3, max_tokens=6),
    BeamSearchParams(beam_width=3, n=2, max_tokens=6),
    ContrastiveSearchParams(top_k=3, max_tokens=6),
    MCTSParams(num_simulations=4, top_k=2, leaf_batch_size=2, max_depth=2, max_tokens=3, seed=4),
    MCTSParams(num_simulations=3, top_k=2, leaf_batch_size=1, max_depth=2, rollout_tokens=2, max_tokens=2, seed=5),
]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, extra] for extra in range(4)]

MANY = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import msgspec
from pagefork import Client, wire
from pagefork.scheduler.search_params import AnyParams
endpoint, jobs = sys.argv[1], json.load(sys.stdin)
def run(job):
    params = msgspec.json.decode(json.dumps(job["params"]), type=AnyParams)
    with Client(endpoint) as client:
        found = []
        for prompt in job["prompts"]:
            streamed = {}
            stream = client.stream(prompt, params)
            for delta in stream:
                streamed.setdefault(delta.index, []).extend(delta.tokens)
            output = stream.result()
            assert all(completion.token_ids[:len(streamed.get(completion.index, []))] == streamed.get(completion.index, [])
                       for completion in output.outputs)
            found.append([completion.token_ids for completion in output.outputs])
        return found
with ThreadPoolExecutor(len(jobs)) as pool:
    print(json.dumps(list(pool.map(run, jobs))))
"""


def test_64_clients_at_once_get_what_the_engine_in_process_gives(served: Served, demo: LLM) -> None:
    jobs = [
        {"params": msgspec.to_builtins(STRATEGIES[number % len(STRATEGIES)]), "prompts": [PROMPTS[number // 8 % 4]]}
        for number in range(64)
    ]
    processes = [_python(MANY, served.endpoint) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        shares = [jobs[at::4] for at in range(4)]
        said = list(
            pool.map(lambda pair: pair[0].communicate(json.dumps(pair[1]), timeout=60)[0], zip(processes, shares, strict=True))
        )
    prompts = [PROMPTS[number // 8 % 4] for number in range(64)]
    expected = tokens_of(demo, prompts, [STRATEGIES[number % len(STRATEGIES)] for number in range(64)])
    for at, text in enumerate(said):
        assert [answer[0] for answer in json.loads(text)] == expected[at::4]


def tokens_of(demo: LLM, prompts: list[list[int]], params: list[Any]) -> list[list[list[int]]]:
    """What the engine in process gives."""
    outputs = demo.generate(prompts, params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]

"""The limits of a served engine: what is at one is served, and what is past it is refused, alone and at no cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from support.dealer import Dealer, eventually, grow
from support.served_requests import LONG, PROMPT, SHORT
from support.serving_process import LIMITS, configured, serving

from pagefork import SamplingParams, wire
from pagefork.limits import Limits
from pagefork.server.launch import Served


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

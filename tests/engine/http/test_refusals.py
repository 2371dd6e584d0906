"""Who and what is refused, always in OpenAI's shape."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import Pair, engine, gateway, until

from pagefork.server.launch import Served

LEAST: dict[str, Any] = {"model": "demo", "prompt": "def f(", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def refused(response: httpx.Response, status: int, **fields: Any) -> dict[str, Any]:
    """The error of an answer, after a look at its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert {name: error[name] for name in fields} == fields
    return error


@pytest.fixture(scope="module")
def locked(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With a key, without a chat template, and with narrow limits of its own."""
    settings = {"max_body_bytes": 4096, "body_seconds": 0.5, "max_prompts": 3, "allowed_hosts": ["models.example"]}
    with gateway(served, tmp_path_factory.mktemp("locked"), key="top-secret", **settings) as found:
        yield found


KEY = {"authorization": "Bearer top-secret"}
ROUTES = ["/v1/models", "/v1/models/demo", "/metrics", "/version", "/openapi.json", "/nowhere", "/v1/completions", "/tokenize"]


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_but_health_takes_the_key(locked: Pair, path: str) -> None:
    for wrong in ({}, {"authorization": "Bearer top-secre"}, {"authorization": "Basic top-secret"}, {"authorization": "Bearer"}):
        answer = locked.get(path, headers=wrong)
        refused(answer, 401, code="invalid_api_key", type="authentication_error")
        assert answer.headers["www-authenticate"] == "Bearer" and "secret" not in answer.text
    assert locked.get(path, headers=KEY).status_code in (200, 404, 405)
    assert locked.get("/health").status_code == 200


def test_a_key_that_is_no_ascii_is_wrong(locked: Pair) -> None:
    refused(locked.get("/v1/models", headers={"authorization": b"Bearer top-secr\xe9t"}), 401)


def test_the_host_has_to_be_one_of_this_server(pair: Pair, locked: Pair) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]:80", ""):
        refused(pair.get("/health", headers={"host": host}), 400, code="invalid_host")
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000"):
        assert pair.get("/health", headers={"host": host}).status_code == 200
    assert locked.get("/health", headers={"host": "Models.example:443"}).status_code == 200


def test_routes_and_methods_that_are_not_there(pair: Pair) -> None:
    refused(pair.get("/v1/engines"), 404)
    refused(pair.get("/v1/models/"), 404)
    refused(pair.get("/v1/models/%ff%00/x"), 404, code="model_not_found")
    answer = pair.get("/v1/completions")
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"
    refused(pair.post("/health", {}), 405)
    refused(httpx.delete(f"{pair.url}/v1/models"), 405)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_body_is_json_in_utf_8(pair: Pair, path: str) -> None:
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/json; charset=utf-16"}):
        refused(pair.post(path, content=b"{}", headers=headers), 415)
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    refused(pair.post(path, content=b"{}", headers=packed), 415)
    deep = b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}"
    for body in (
        b"",
        b"[",
        b"[1]",
        b"\xff",
        b'{"model": NaN}',
        b'{"model": "a", "model": "b"}',
        b"[" * 200_000,
        b'{"\\ud800": 1}',
        deep,
    ):
        refused(pair.post(path, content=body, headers={"content-type": "application/json"}), 400)


def test_depth_that_a_parser_takes_is_no_failure_later(pair: Pair) -> None:
    for depth in (50, 400, 800, 900, 950, 1000):
        value: Any = "x"
        for _ in range(depth):
            value = [value]
        text = json.dumps(CHAT)[:-1] + f', "chat_template_kwargs": {{"deep": {"[" * depth}1{"]" * depth}}}}}'
        answer = pair.post("/v1/chat/completions", content=text, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), answer.text


def test_a_body_has_a_largest_size(locked: Pair) -> None:
    large = json.dumps(LEAST | {"user": "x" * 5000}).encode()
    headers = KEY | {"content-type": "application/json"}
    refused(locked.post("/v1/completions", content=large, headers=headers), 413)
    refused(locked.post("/v1/completions", content=iter([large[:2000], large[2000:4000], large[4000:]]), headers=headers), 413)


def test_a_body_that_does_not_come_is_not_waited_for(locked: Pair) -> None:
    address = httpx.URL(locked.url)
    with socket.create_connection((address.host, address.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer top-secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        raw.settimeout(10)
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        assert answer.status == 408 and json.loads(answer.read())["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [316, "x"]}, "prompt"),
        ({"prompt": ["x", 316]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [2**62]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [["x"]]}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": 10**400}, None),
        ({"n": 2, "temperature": 0}, "temperature"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999_999]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stream": True, "echo": True, "logprobs": 1}, "echo"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"priority": 2**40}, "priority"),
        ({"beam_search": {"beam_width": 5000}}, "beam_width"),
        ({"mcts": {"value_fn": "os.system"}}, None),
        ({"suffix": "x"}, "suffix"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_that_cannot_be_honoured_is_named(pair: Pair, fields: dict[str, Any], param: str | None) -> None:
    error = refused(pair.post("/v1/completions", LEAST | fields), 400)
    if param is not None:
        assert error["param"] == param, error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages"),
        ({"messages": [{}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, None),
        ({"continue_final_message": True, "add_generation_prompt": True}, None),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"prompt": "x"}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_conversation_that_cannot_be_answered_is_named(pair: Pair, fields: dict[str, Any], param: str | None) -> None:
    error = refused(pair.post("/v1/chat/completions", CHAT | fields), 400)
    if param is not None:
        assert error["param"] == param, error


def test_without_a_chat_template_an_error_says_so(locked: Pair) -> None:
    answer = locked.post("/v1/chat/completions", CHAT, headers=KEY)
    assert "--chat-template" in refused(answer, 400, code="no_chat_template")["message"]
    assert locked.post("/v1/completions", LEAST, headers=KEY).status_code == 200
    refused(locked.post("/v1/completions", LEAST | {"prompt": ["x"] * 4}, headers=KEY), 400, param="prompt")


def test_texts_become_tokens_and_tokens_texts(pair: Pair) -> None:
    found = pair.post("/tokenize", {"prompt": "def f(x)", "return_token_strs": True}).json()
    assert "".join(found["token_strs"]) == "def f(x)" and found["count"] == len(found["tokens"])
    assert pair.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "def f(x)"}
    chat = pair.post("/tokenize", {"messages": CHAT["messages"]}).json()
    assert pair.post("/detokenize", {"tokens": chat["tokens"]}).json() == {"prompt": "# user: x\n# assistant: "}
    for body in (
        {},
        {"prompt": "x", "messages": []},
        {"prompt": "x", "add_generation_prompt": True},
        {"prompt": 5},
        {"text": "x"},
    ):
        refused(pair.post("/tokenize", body), 400)
    refused(pair.post("/tokenize", {"prompt": "x", "model": "other"}), 404)
    for tokens in ([-1], [10**6], [2**40], ["x"], None, [True]):
        refused(pair.post("/detokenize", {"tokens": tokens}), 400)


def test_a_failure_of_the_server_has_the_shape_too_and_is_logged(pair: Pair) -> None:
    """The template of these tests has a bug that one role meets."""
    answer = pair.post("/v1/chat/completions", CHAT | {"messages": [{"role": "bug", "content": "x"}]})
    refused(answer, 500, type="server_error", code="internal")
    number = answer.headers["x-request-id"]
    until(lambda: any("http.bug" in line and number in line and "sandbox" in line for line in pair.log().splitlines()))
    assert pair.complete().status_code == 200


def test_a_request_id_is_kept_when_it_is_one_and_a_log_line_can_not_be_forged(pair: Pair) -> None:
    assert pair.get("/version", headers={"x-request-id": "a.B_c-1"}).headers["x-request-id"] == "a.B_c-1"
    for odd in ("a b", 'x" status=200', "x" * 65, "é"):
        made = pair.get("/version", headers={"x-request-id": odd.encode()}).headers["x-request-id"]
        assert made != odd and made.isalnum()
    pair.get("/%0a2026-01-01T00:00:00Z%20ERROR%20forged%1b[31m")
    until(lambda: "forged" in pair.log() and "a.B_c-1" in pair.log())
    lines = pair.log().splitlines()
    assert all(line[:2] == "20" and line.isascii() and line.isprintable() for line in lines)
    assert not any(line.split()[1] == "ERROR" and "forged" in line for line in lines)


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    with engine({"max_requests": 1}) as small, gateway(small, tmp_path) as pair:
        body = LEAST | {"max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{pair.url}/v1/completions", json=body, timeout=30) as first:
            lines = first.iter_lines()
            assert next(lines).startswith("data: ")
            for stream in (False, True):
                answer = pair.complete(stream=stream)
                refused(answer, 429, code="queue_full", type="rate_limit_error")
                assert int(answer.headers["retry-after"]) >= 1
        _lost(small, pair, body)


def _lost(small: Served, pair: Pair, body: dict[str, Any]) -> None:
    """An engine that dies ends a stream that has begun with an event, and what comes later with a status."""
    until(lambda: pair.complete().status_code == 200)  # the one before it has left
    with httpx.stream("POST", f"{pair.url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        small.kill()
        killed = time.monotonic()
        rest = [line for line in lines if line]
        assert time.monotonic() - killed < 5
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_lost"
    assert "data: [DONE]" not in rest
    until(lambda: pair.get("/health").status_code == 503)
    assert pair.health()["status"] == "the engine does not answer"
    answer = pair.complete()
    refused(answer, 503, code="engine_lost", type="server_error")
    assert answer.headers["retry-after"]

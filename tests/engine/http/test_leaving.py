"""Clients that leave, or read slowly: the engine works for nobody who does not read."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import Pair, gateway, until

from pagefork import Client
from pagefork.server.launch import Served
from pagefork.wire import StatsReply

LONG: dict[str, Any] = {"model": "demo", "prompt": "def f(", "max_tokens": 900, "ignore_eos": True, "temperature": 1}


def send(pair: Pair, body: dict[str, Any], path: str = "/v1/completions", receive_buffer: int | None = None) -> socket.socket:
    """A request over a socket that is the test's to close."""
    address = httpx.URL(pair.url)
    raw = socket.socket()
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.connect((address.host, address.port))
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    raw.sendall(head.encode() + text)
    return raw


def stats(served: Served) -> StatsReply:
    with Client(served.endpoint) as client:
        return client.stats()


def is_idle(served: Served) -> bool:
    found = stats(served)
    return found.engine.num_running == found.engine.num_waiting == 0 and found.engine.free_blocks == found.engine.num_blocks


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["close", "reset"])
def test_a_client_that_leaves_frees_the_blocks_of_all_its_requests(pair: Pair, served: Served, stream: bool, way: str) -> None:
    until(lambda: is_idle(served))
    before = stats(served)
    raw = send(pair, LONG | {"stream": stream, "prompt": ["def f(", "import"], "n": 2})
    until(lambda: stats(served).engine.num_running == 2)
    if way == "reset":
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    until(lambda: is_idle(served), seconds=5)
    until(lambda: stats(served).service.requests == 0)
    computed = stats(served).engine.generated_tokens - before.engine.generated_tokens
    assert computed < 4 * 900  # none of them ran to its end
    until(lambda: "status=499" in pair.log())


def test_a_client_that_leaves_while_it_waits_in_the_queue_is_forgotten(pair: Pair, served: Served) -> None:
    until(lambda: is_idle(served))
    full = send(pair, LONG | {"n": 64})
    until(lambda: stats(served).engine.num_running == 1)
    waiting = send(pair, LONG)
    until(lambda: stats(served).engine.num_waiting == 1)
    waiting.close()
    until(lambda: stats(served).engine.num_waiting == 0)
    full.close()
    until(lambda: is_idle(served))


def test_a_slow_reader_holds_up_its_own_outputs_only(pair: Pair, served: Served) -> None:
    """What is not read waits in the engine: neither the gateway nor the engine send what there is no room for."""
    until(lambda: is_idle(served))
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "ignore_eos": True}
    body |= {"stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}
    raw = send(pair, body, "/v1/chat/completions", receive_buffer=4096)
    try:
        until(lambda: stats(served).engine.num_running == 1)
        begun = time.monotonic()
        assert pair.complete(max_tokens=8).status_code == 200
        assert time.monotonic() - begun < 20
        until(lambda: is_idle(served), seconds=60)  # it has computed all; most of it is not delivered
        assert stats(served).service.requests == 1
        received = bytearray()
        raw.settimeout(60)
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = raw.recv(1 << 16)
            assert piece, received[-200:]
            received += piece
    finally:
        raw.close()
    text = b"".join(received.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2])
    events = [json.loads(line[6:]) for line in text.split(b"\n\n")[:-2]]
    tokens = [len(choice["logprobs"]["content"]) for event in events for choice in event["choices"] if choice["logprobs"]]
    assert sum(tokens) == 8 * 400
    until(lambda: stats(served).service.requests == 0)


def test_a_client_that_reads_nothing_loses_its_answer(served: Served, tmp_path: Path) -> None:
    """The echoes of many prompts are more than the buffers of two sockets take."""
    until(lambda: is_idle(served))
    with gateway(served, tmp_path, unread_seconds=0.5, max_calls=1) as pair:
        raw = send(
            pair,
            LONG | {"stream": True, "echo": True, "n": 64, "prompt": ["x " * 400] * 128, "max_tokens": 100},
            receive_buffer=4096,
        )
        until(lambda: "read nothing" in pair.log(), seconds=30)
        until(lambda: is_idle(served) and pair.complete().status_code == 200, seconds=30)
        raw.close()


def test_a_client_that_closes_its_half_gets_its_answer_or_ends_it(pair: Pair, served: Served) -> None:
    raw = send(pair, LONG | {"max_tokens": 3})
    raw.shutdown(socket.SHUT_WR)
    raw.settimeout(20)
    received = b""
    while piece := raw.recv(1 << 16):
        received += piece
    raw.close()
    assert received == b"" or b" 200 OK" in received
    until(lambda: is_idle(served))


def test_many_clients_leave_at_any_moment_and_nothing_stays_behind(pair: Pair, served: Served) -> None:
    def come_and_go(number: int) -> None:
        raw = send(pair, LONG | {"stream": number % 2 == 0, "seed": number})
        time.sleep(number % 10 * 0.03)
        raw.close()

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: is_idle(served) and stats(served).service.requests == 0)
    assert pair.complete().status_code == 200

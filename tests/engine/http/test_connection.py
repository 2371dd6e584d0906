"""Connections: what a client can hold by sending too little, too much or too early, or by reading nothing."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
from support.gateway import Pair, gateway, until

from pagefork.server.launch import Served

from .test_leaving import LONG, is_idle, send, stats

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connect(pair: Pair) -> socket.socket:
    address = httpx.URL(pair.url)
    return socket.create_connection((address.host, address.port), timeout=20)


def received(raw: socket.socket) -> bytes:
    found = b""
    try:
        while piece := raw.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def descriptors(pair: Pair) -> int:
    return len(os.listdir(f"/proc/{pair.child.process.pid}/fd"))  # noqa: PTH208


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_client_that_leaves_after_it_sent_more_frees_its_blocks(pair: Pair, served: Served, stream: bool, pause: float) -> None:
    until(lambda: is_idle(served))
    before = stats(served).engine.generated_tokens
    raw = send(pair, LONG | {"stream": stream})
    time.sleep(pause)
    raw.sendall(HEALTH)
    until(lambda: stats(served).engine.num_running == 1)
    raw.close()
    until(lambda: is_idle(served), seconds=5)
    assert stats(served).engine.generated_tokens - before < 900


def test_what_is_asked_before_the_answer_is_answered_in_order_or_not_at_all(pair: Pair) -> None:
    raw = connect(pair)
    raw.sendall(HEALTH * 20 + HEALTH.replace(b"localhost", b"localhost\r\nConnection: close"))
    assert received(raw).count(b"HTTP/1.1 200 OK") == 21
    raw = send(pair, LONG | {"max_tokens": 50})
    time.sleep(0.1)
    raw.sendall(HEALTH)
    raw.settimeout(20)
    assert received(raw).count(b"HTTP/1.1 200 OK") == 1
    raw.close()


def test_a_head_has_a_bound_in_bytes_and_in_time(served: Served, tmp_path: Path) -> None:
    with gateway(served, tmp_path, body_seconds=0.5) as pair:
        usual = descriptors(pair)
        silent, slow, refused, large = (connect(pair) for _ in range(4))
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        refused.sendall(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        assert refused.recv(1) == b"H"
        refused.sendall(b"x")
        large.sendall(b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 20_000)
        assert received(silent) == received(slow) == b"" and received(refused).startswith(b"TTP/1.1 404 ")
        assert received(large)[:13] in (b"", b"HTTP/1.1 400 ")
        until(lambda: descriptors(pair) <= usual)


def test_a_client_that_reads_nothing_loses_its_connection(served: Served, tmp_path: Path) -> None:
    """It holds neither a descriptor nor what it did not read, whether its answer was complete or not."""
    many = {"echo": True, "n": 64, "prompt": ["x " * 400] * 128, "max_tokens": 1, "stream": False}
    with gateway(served, tmp_path, unread_seconds=0.5) as pair:
        usual = descriptors(pair)
        streamed, whole = (send(pair, LONG | many | {"stream": stream}, receive_buffer=4096) for stream in (True, False))
        until(lambda: pair.log().count('path="/v1/completions"') == 2, seconds=60)
        until(lambda: descriptors(pair) <= usual)
        assert "read nothing" in pair.log() and "ERROR" not in pair.log()
        streamed.close()
        whole.close()


def test_a_client_that_reads_nothing_does_not_hear_of_the_end_either(served: Served, tmp_path: Path) -> None:
    many = {"echo": True, "n": 64, "prompt": ["x " * 400] * 128, "max_tokens": 1, "stream": True}
    with gateway(served, tmp_path, unread_seconds=1.5, drain_seconds=0.2) as pair:
        before = stats(served).service.accepted
        raw = send(pair, LONG | many, receive_buffer=4096)
        until(lambda: stats(served).service.accepted == before + 128, seconds=30)
        time.sleep(0.2)
        pair.child.signal(signal.SIGTERM)
        assert pair.child.wait(10) == 0
        assert "ERROR" not in pair.log() and "read nothing" in pair.log()
        raw.close()

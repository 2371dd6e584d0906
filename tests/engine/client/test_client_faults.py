"""Clients whose connection is cut and whose engine is killed, restarted or closed to them; all with real processes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.serving_process import configured, serving

from pagefork import LLM, AsyncClient, Client, RequestOutput, SamplingParams, ServiceError
from pagefork.scheduler.errors import ConfigError, EngineMisuseError
from pagefork.server.keys import new_keys
from pagefork.server.launch import Served
from pagefork.wire import Code

PROMPT = "def read_lines(path):\n"
LONG = SamplingParams(max_tokens=400, ignore_eos=True, seed=7)
SLACK = 1.0  # seconds, on a machine that does much else


class Proxy:
    """A TCP port in front of another one. cut() resets what goes through it."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._open += [near, far]
            self.connections += 1
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 12):
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxied(served: Served) -> Iterator[Proxy]:
    proxy = Proxy(served.endpoint)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.fixture(scope="module")
def on_tcp() -> Iterator[Served]:
    with serving(configured(bind="tcp://127.0.0.1:0")) as served:
        yield served


def test_streams_go_on_without_loss_when_their_connection_is_cut_again_and_again(on_tcp: Served, demo: LLM) -> None:
    params = [LONG.replace(seed=seed, max_tokens=500) for seed in range(4)]
    expected = [output.outputs for output in demo.generate([PROMPT] * 4, params, use_tqdm=False)]
    with proxied(on_tcp) as proxy, Client(proxy.endpoint, token=on_tcp.token, window=16) as client:
        streams = [client.stream(PROMPT, mine) for mine in params]
        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(stream.result) for stream in streams]
            while not all(result.done() for result in results):
                time.sleep(0.2)
                proxy.cut()
        assert [result.result().outputs for result in results] == expected
        assert proxy.connections > 3


def test_a_client_without_the_token_is_told_at_once(on_tcp: Served) -> None:
    for token in ("wrong", None):
        begun = time.monotonic()
        with pytest.raises(ServiceError) as caught:
            Client(on_tcp.endpoint, token=token)
        assert caught.value.code == Code.UNAUTHENTICATED
        assert time.monotonic() - begun < 5


def test_an_engine_that_is_killed_ends_every_stream_with_a_typed_error_and_the_next_one_is_found(demo: LLM) -> None:
    short = LONG.replace(max_tokens=20)
    [expected] = demo.generate(PROMPT, short, use_tqdm=False)
    with serving() as served, Client(connect_timeout=60.0) as client:
        read, fresh = client.stream(PROMPT, LONG), client.stream(PROMPT, LONG.replace(n=8))
        first = next(read)
        served.kill()
        killed = time.monotonic()
        with pytest.raises(ServiceError) as caught:
            list(read)
        assert time.monotonic() - killed < 2.0 + SLACK
        assert caught.value.code == Code.ENGINE_LOST and not caught.value.retry_safe
        output = caught.value.output
        assert isinstance(output, RequestOutput) and not output.finished
        assert output.outputs[0].token_ids[: len(first.tokens)] == first.tokens
        assert expected.outputs[0].token_ids[: len(first.tokens)] == first.tokens[:20]
        with pytest.raises(ServiceError) as caught:
            list(fresh)
        assert caught.value.code == Code.ENGINE_LOST
        assert caught.value.retry_safe == (caught.value.output is None)
        early = client.stream(PROMPT, short)
        with Served(configured()) as again:
            assert early.result().outputs == expected.outputs
            assert client.generate(PROMPT, short).outputs == expected.outputs
            assert client.welcome is not None and client.welcome.boot_id == again.boot_id


def test_an_engine_that_is_told_to_stop_lets_requests_end_and_refuses_new_ones() -> None:
    with serving() as served, Client() as client:
        stream = client.stream(PROMPT, LONG.replace(max_tokens=150))
        next(stream)
        served.terminate()
        while client.health().state != "draining":
            time.sleep(0.01)
        with pytest.raises(ServiceError) as caught:
            client.generate(PROMPT)
        assert caught.value.code == Code.DRAINING and caught.value.retry_safe
        assert len(stream.result().outputs[0].token_ids) == 150


def test_keys_open_the_door_and_others_do_not(tmp_path: Path) -> None:
    for name in ("engine", "mine", "other"):
        new_keys(tmp_path, name)
    keys: dict[str, Any] = {"curve_secret_key": str(tmp_path / "engine.key_secret"), "curve_clients": str(tmp_path / "mine.key")}
    with serving(configured(bind="tcp://127.0.0.1:0", **keys)) as served:
        theirs = str(tmp_path / "engine.key")
        with Client(served.endpoint, server_key=theirs, key=str(tmp_path / "mine.key_secret"), token=served.token) as client:
            assert client.health().state == "running"
        with pytest.raises(ServiceError) as caught:
            Client(served.endpoint, server_key=theirs, key=str(tmp_path / "other.key_secret"), connect_timeout=1.0)
        assert caught.value.code in (Code.UNAUTHENTICATED, Code.ENGINE_LOST)
        with pytest.raises(ServiceError) as caught:
            Client(served.endpoint, connect_timeout=1.0)
        assert caught.value.code == Code.ENGINE_LOST
    with pytest.raises(ConfigError, match="belong together"):
        Client("tcp://127.0.0.1:1", server_key=theirs)


def test_addresses_that_are_none_are_refused_and_where_nothing_listens_the_client_gives_up_in_time() -> None:
    for address in ("http://localhost", "no/name", ""):
        with pytest.raises(ConfigError):
            Client(address)
    begun = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        Client("no-such-engine", connect_timeout=0.3)
    assert caught.value.code == Code.ENGINE_LOST and caught.value.retry_safe
    assert 0.3 <= time.monotonic() - begun < 0.3 + SLACK


def test_an_async_client_needs_a_loop() -> None:
    with pytest.raises(EngineMisuseError, match="event loop"):
        AsyncClient()

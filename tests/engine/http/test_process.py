"""The gateway's process: how it starts, what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import engine, environment, gateway, until

from pagefork import PageforkError
from pagefork.http.config import KEY_VARIABLE, GatewayConfig
from pagefork.scheduler.errors import ConfigError, ModelError
from pagefork.server.launch import Child, Served

LONG: dict[str, Any] = {"model": "demo", "prompt": "def f(", "max_tokens": 900, "ignore_eos": True, "stream": True}


def refusal(served: Served, error: type[Exception], key: str | None = None, **settings: Any) -> str:
    """What a gateway says that can't start."""
    usual = {"endpoint": served.endpoint, "model_directory": served.facts["model_directory"], "model_names": ["demo"], "port": 0}
    given = environment(**{KEY_VARIABLE: key} if key is not None else {})
    child = Child("the gateway", "pagefork.http", GatewayConfig(**usual | settings), environment=given)
    try:
        with pytest.raises(error) as caught:
            child.ready(60)
        assert child.wait(10) != 0
        return str(caught.value)
    finally:
        child.signal(signal.SIGKILL)
        child.process.wait()
        child.close()


def test_other_machines_are_let_in_with_a_key_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key_of(**settings: Any) -> str | None:
        return GatewayConfig(endpoint="x", model_directory="x", model_names=["x"], **settings).api_key()

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    (file := tmp_path / "key").write_text("secret\n")
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert key_of(host=host) is None
    for host in ("0.0.0.0", "::", "192.0.2.1", "localhost.example", "example"):
        with pytest.raises(ConfigError, match="API key"):
            key_of(host=host)
        file.chmod(0o644)
        with pytest.raises(ConfigError, match="0600"):
            key_of(host=host, api_key_file=str(file))
        file.chmod(0o600)
        assert key_of(host=host, api_key_file=str(file)) == "secret"
    for wrong in ("", " ", "naïve", "two\nlines"):
        monkeypatch.setenv(KEY_VARIABLE, wrong)
        with pytest.raises(ConfigError, match="printable"):
            key_of()


def test_what_it_cannot_start_with_is_told(served: Served, tmp_path: Path) -> None:
    assert "can't be read" in refusal(served, ConfigError, chat_template=str(tmp_path / "none"))
    (tmp_path / "bad.jinja").write_text("{% for %}")
    assert "Jinja" in refusal(served, ModelError, chat_template=str(tmp_path / "bad.jinja"))
    assert "can't be bound" in refusal(served, ConfigError, host="192.0.2.1", key="secret")
    refusal(served, PageforkError, endpoint=f"ipc://{tmp_path}/none", connect_seconds=0.1)
    with pytest.raises(ConfigError, match="model_names"):
        GatewayConfig(endpoint="x", model_directory="x", model_names=[])


def test_a_configuration_that_is_none_is_told() -> None:
    for line in (b"{}\n", b"\xff\n"):
        child = subprocess.run([sys.executable, "-P", "-m", "pagefork.http"], input=line, capture_output=True, timeout=60)
        assert child.returncode == 2 and json.loads(child.stdout)["kind"] == "ConfigError"


def test_with_a_key_every_address_can_be_bound(served: Served, tmp_path: Path) -> None:
    (key := tmp_path / "key").write_text("secret\n")
    key.chmod(0o600)
    with gateway(served, tmp_path, host="0.0.0.0", api_key_file=str(key)) as pair:
        url = pair.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_no_secret_is_on_the_command_line_or_in_the_log(served: Served, tmp_path: Path) -> None:
    with gateway(served, tmp_path, key="top-secret") as pair:
        pair.get("/v1/models", headers={"authorization": "Bearer top-secret"})
        command = Path(f"/proc/{pair.child.process.pid}/cmdline").read_bytes()
        assert b"secret" not in command and "secret" not in pair.log()


def test_it_needs_no_torch(served: Served, tmp_path: Path) -> None:
    with gateway(served, tmp_path) as pair:
        assert pair.complete(max_tokens=2).status_code == 200
        assert "torch" not in Path(f"/proc/{pair.child.process.pid}/maps").read_text()


def test_sigterm_lets_open_answers_end(served: Served, tmp_path: Path) -> None:
    with gateway(served, tmp_path, drain_seconds=30.0) as pair, httpx.Client(base_url=pair.url, timeout=30) as other:
        body = LONG | {"seed": 3}
        [whole] = pair.post("/v1/completions", body | {"stream": False}).json()["choices"]
        assert other.get("/health").status_code == 200
        with httpx.stream("POST", f"{pair.url}/v1/completions", json=body, timeout=30) as answer:
            lines = filter(None, answer.iter_lines())
            first = next(lines)
            pair.child.signal(signal.SIGTERM)
            until(lambda: "gateway.stopping" in pair.log())
            with suppress(httpx.TransportError):  # nothing listens any more, or will not for long
                assert httpx.post(f"{pair.url}/v1/completions", json=body, timeout=5).status_code == 503
            *chunks, end = first, *lines
        texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in chunks]
        assert end == "data: [DONE]" and "".join(texts) == whole["text"]
        assert pair.child.wait(10) == 0


def test_what_is_open_when_the_time_to_drain_is_over_is_told_so(served: Served, tmp_path: Path) -> None:
    with gateway(served, tmp_path, drain_seconds=0.3) as pair:
        whole: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: whole.append(pair.post("/v1/completions", LONG | {"stream": False, "n": 8})))
        waiting.start()
        with httpx.stream("POST", f"{pair.url}/v1/completions", json=LONG | {"n": 8}, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            begun = time.monotonic()
            pair.child.signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "draining"
        waiting.join()
        assert whole[0].status_code == 503 and whole[0].json()["error"]["code"] == "draining"
        assert pair.child.wait(10) == 0
        assert time.monotonic() - begun < 10


def test_it_ends_with_its_parent(served: Served, tmp_path: Path) -> None:
    with gateway(served, tmp_path) as pair:
        address = httpx.URL(pair.url)
        pair.child._stdin.close()
        assert pair.child.process.wait(5) != 0
        with pytest.raises(ConnectionRefusedError), socket.create_connection((address.host, address.port), timeout=5):
            pass


def test_a_draining_engine_is_no_healthy_one(tmp_path: Path) -> None:
    with engine() as served, gateway(served, tmp_path) as pair:
        with httpx.stream("POST", f"{pair.url}/v1/completions", json=LONG | {"n": 8}, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.terminate()
            until(lambda: pair.complete().status_code == 503, seconds=3)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] in ("draining", "engine_lost")
        until(lambda: pair.get("/health").status_code == 503)


def test_a_deadline_ends_a_call_that_takes_longer(served: Served, tmp_path: Path) -> None:
    with gateway(served, tmp_path, deadline_seconds=0.2) as pair:
        answer = pair.complete(max_tokens=900, ignore_eos=True, n=8)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline"


def test_calls_beyond_the_limit_are_refused(served: Served, tmp_path: Path) -> None:
    with gateway(served, tmp_path, max_calls=1) as pair:
        with httpx.stream("POST", f"{pair.url}/v1/completions", json=LONG, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            refused = pair.complete()
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_many_calls"
            assert int(refused.headers["retry-after"]) >= 1 and pair.get("/health").status_code == 200
        until(lambda: pair.complete().status_code == 200)

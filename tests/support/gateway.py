"""An engine and a gateway as processes, and what their tests ask them."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from pagefork import EngineConfig
from pagefork.http.config import KEY_VARIABLE, GatewayConfig
from pagefork.server.config import ServiceConfig
from pagefork.server.launch import Child, Served

TEMPLATE = (
    "{% set newline = '\\n' %}{% for message in messages %}"
    "{% if message.role == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "{% if message.role == 'bug' %}{{ ''.__class__.__mro__[1] }}{% endif %}"
    "# {{ message.role }}: {{ message.content }}{% if not (continue_final_message and loop.last) %}{{ newline }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}# assistant: {{ mood }}{% endif %}"
)


class Pair:
    """A gateway before an engine, `url` its address, and what it has logged so far."""

    def __init__(self, served: Served, child: Child, url: str, logged: Path) -> None:
        self.served, self.child, self.url, self._logged = served, child, url, logged

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **({"json": body} if body is not None else {}), **options)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "demo", "prompt": "def f(", **fields})

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/health").json()
        return found

    def log(self) -> str:
        return self._logged.read_text()


def environment(**more: str) -> dict[str, str]:
    """Of a child; no key of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if name != KEY_VARIABLE} | more


@contextmanager
def engine(limits: dict[str, int] | None = None, **settings: Any) -> Iterator[Served]:
    """A served demo model."""
    from pagefork.limits import Limits

    usual: dict[str, Any] = {"model": "demo", "dtype": "float32", "num_blocks": 1000, "max_num_seqs": 64}
    with tempfile.TemporaryDirectory(prefix="pf") as folder, open(os.devnull, "wb") as nothing:  # noqa: PTH123
        config = ServiceConfig(engine=EngineConfig(**usual | settings), limits=Limits(**limits or {}), drain_timeout=1)
        with Served(config, stderr=nothing, environment=environment(PAGEFORK_RUNTIME_DIR=folder)) as served:
            yield served


@contextmanager
def gateway(served: Served, folder: Path, key: str | None = None, **settings: Any) -> Iterator[Pair]:
    """A gateway before it, ended by SIGTERM; that it obeys is part of every test."""
    usual: dict[str, Any] = {
        "endpoint": served.endpoint,
        "model_directory": served.facts["model_directory"],
        "model_names": ["demo"],
        "port": 0,
        "drain_seconds": 1.0,
    }
    logged = folder / f"gateway-{time.monotonic_ns()}.log"
    with logged.open("wb") as file:
        given = environment(**{KEY_VARIABLE: key} if key is not None else {})
        child = Child("the gateway", "pagefork.http", GatewayConfig(**usual | settings), file, given)
    try:
        yield Pair(served, child, child.ready(60)["url"], logged)
        if child.process.poll() is None:
            child.signal(signal.SIGTERM)
            assert child.wait(20) == 0
    finally:
        child.signal(signal.SIGKILL)
        child.process.wait()
        child.close()


def until(reached: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that has to come about."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)

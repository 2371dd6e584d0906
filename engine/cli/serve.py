"""`pagefork serve`: an engine behind a socket, and the HTTP gateway before it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from pagefork.cli.flags import Given
from pagefork.cli.generate import DEFAULT_ENGINE
from pagefork.cli.text import one_line
from pagefork.config import EngineConfig
from pagefork.http.config import GatewayConfig
from pagefork.limits import Limits
from pagefork.scheduler.errors import ConfigError
from pagefork.server.config import ServiceConfig
from pagefork.server.supervisor import Facts, MakesGateway, Supervisor

_FROM_ELSEWHERE = {
    *("endpoint", "model_directory", "token_file", "server_key_file", "host", "port"),
    *("drain_seconds", "log_level"),
}
_EXTRA = ("starlette", "uvicorn", "prometheus_client")
_SHORTEST_DRAIN = 0.1  # seconds; the gateway takes no 0


def serve(
    served: Annotated[str | None, typer.Argument(metavar="MODEL", help="Wins over --model")] = None,
    *,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Start the OpenAI-compatible gateway here; port 0: any")
    ] = None,
    service: Annotated[Given, ServiceConfig, {"timing"}],
    gateway: Annotated[Given, GatewayConfig, _FROM_ELSEWHERE],
    limits: Annotated[Given, Limits],
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C, which let accepted requests end first.

    Clients on this machine connect to a socket that only this user can open; --bind and --http are for others. What went
    wrong later is logged on standard error, and the exit code is not 0.
    """
    named = {} if served is None else {"model": served}
    config = ServiceConfig(engine=EngineConfig(**{**DEFAULT_ENGINE, **engine, **named}), limits=Limits(**limits), **service)
    if http is None and gateway:
        raise ConfigError(f"{', '.join(gateway)}: settings of the gateway, which --http HOST:PORT starts")
    wanted = None if http is None else _gateway(config, http, gateway)

    def say(engine: Facts, gateway: Facts | None) -> None:
        print(f"pagefork: {one_line(config.engine.model)} is served as {config.name} at {engine['endpoint']}")
        if engine["token_file"] is not None:
            print(f"pagefork: clients show the token in {engine['token_file']}")
        if gateway is not None:
            print(f"pagefork: the OpenAI API is at {gateway['url']}")
        sys.stdout.flush()

    Supervisor(config, wanted, say).run()


def _gateway(config: ServiceConfig, http: str, given: Given) -> MakesGateway:
    """Makes the gateway's settings of the engine's facts; what the user gave is checked before anything starts."""
    if absent := [name for name in _EXTRA if find_spec(name) is None]:
        raise ConfigError(f"http needs {', '.join(absent)}, which come with pip install 'pagefork[http]'")
    host, _, port = http.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise ConfigError(f"http={http!r} reads HOST:PORT, with a port below 65536, or 0 for any that is free")
    if (config.curve_secret_key is None) != ("key_file" not in given):
        raise ConfigError("key_file and curve_secret_key go together: the gateway is a client, with keys that the engine knows")
    own = {
        "model_names": [config.engine.model],
        "host": host.removeprefix("[").removesuffix("]"),
        "port": int(port),
        "server_key_file": config.curve_secret_key,
        "log_level": config.log_level,
        "drain_seconds": max(config.drain_timeout, _SHORTEST_DRAIN),
    }

    def make(facts: Facts) -> GatewayConfig:
        found = {name: facts[name] for name in ("endpoint", "model_directory", "token_file")}
        return GatewayConfig(**{**own, **found, **given})

    make({"endpoint": "ipc://", "model_directory": ".", "token_file": None}).api_key()
    return make

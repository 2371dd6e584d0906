"""The settings of a service, as flags have them and as the process that serves reads them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from pagefork.config import EngineConfig
from pagefork.limits import Limits
from pagefork.scheduler.checking import Checked
from pagefork.scheduler.errors import ConfigError, PageforkError


class ServiceConfig(Checked, frozen=True, kw_only=True):
    """Settings of a service. Raises ConfigError (a ValueError) for an unknown name or a value out of range.

    engine, limits: settings of their own. timing: by the names that `server.seam.Timing` has.
    """

    engine: EngineConfig
    limits: Limits = Limits()
    timing: Annotated[
        dict[str, float], Meta(description="Seconds of ping, lease, grace, stall and keep, in Python only; see the protocol")
    ] = msgspec.field(default_factory=dict)
    name: Annotated[str, Meta(description="What clients call this engine")] = "default"
    bind: Annotated[
        str | None, Meta(description="tcp://HOST:PORT to listen on instead of a socket in the runtime directory; port 0: any")
    ] = None
    token_file: Annotated[
        str | None, Meta(description="Holds the token that clients on TCP show; None: one is made for clients of this user")
    ] = None
    curve_secret_key: Annotated[
        str | None, Meta(description="File with the engine's secret key, of `pagefork keys new`; with it TCP is encrypted")
    ] = None
    curve_clients: Annotated[
        str | None, Meta(description="File with the public key of the one client that may connect, or a folder of such files")
    ] = None
    value_fn: Annotated[
        list[str],
        Meta(description="NAME=MODULE:FUNCTION that searches may name; FUNCTION(prompt text) returns a value function"),
    ] = msgspec.field(default_factory=list)
    drain_timeout: Annotated[
        float, Meta(ge=0, le=86400, description="Seconds that accepted requests get to end in when the engine is to stop")
    ] = 30.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="What is logged: this and worse")] = (
        "info"
    )
    log_prompts: Annotated[bool, Meta(description="Log the texts of prompts")] = False

    error: ClassVar[type[PageforkError]] = ConfigError
    foreign: ClassVar[dict[str, str]] = {
        "host": "here it is a part of bind: tcp://HOST:PORT",
        "port": "here it is a part of bind: tcp://HOST:PORT",
    }
    noun: ClassVar[str] = "setting"

    def __post_init__(self) -> None:
        self.check_fields()

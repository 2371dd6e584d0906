"""The gateway's settings, as one line of JSON on its standard input."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from pagefork.scheduler.checking import Checked
from pagefork.scheduler.errors import ConfigError, PageforkError
from pagefork.server.keys import read_secret

KEY_VARIABLE = "PAGEFORK_API_KEY"

Seconds = Annotated[float, Meta(gt=0, le=1e6)]


class GatewayConfig(Checked, frozen=True, kw_only=True):
    """Settings of the HTTP gateway. Raises ConfigError (a ValueError) for an unknown name or a value out of range.

    Secrets stand in files or in the environment. The key is that of api_key_file, else of PAGEFORK_API_KEY; without
    one, nobody is asked for a key, and the gateway binds a loopback address only.
    """

    endpoint: Annotated[str, Meta(min_length=1, description="Of the engine: ipc://..., tcp://... or a name")]
    model_directory: Annotated[str, Meta(min_length=1, description="Where the checkpoint's tokenizer is; already resolved")]
    model_names: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, description="What `model` may say")]
    token_file: Annotated[str | None, Meta(description="Holds the engine's token")] = None
    server_key_file: Annotated[str | None, Meta(description="Holds the engine's public key (CURVE)")] = None
    key_file: Annotated[str | None, Meta(description="Holds the gateway's own pair of keys")] = None
    host: Annotated[str, Meta(min_length=1, description="Address to bind; other than loopback it takes an API key")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="0: any that is free")] = 8000
    allowed_hosts: Annotated[
        list[str],
        Meta(description="What a Host header may say besides the bind address and localhost; '*': anything"),
    ] = []  # noqa: RUF012 - msgspec copies it
    api_key_file: Annotated[str | None, Meta(description="Holds the API key; None: the environment's PAGEFORK_API_KEY")] = None
    chat_template: Annotated[str | None, Meta(description="Jinja file; None: the checkpoint's")] = None
    drain_seconds: Annotated[Seconds, Meta(description="What open answers get to end in after SIGTERM")] = 30.0
    connect_seconds: Annotated[Seconds, Meta(description="How long to wait for the engine at the start")] = 60.0
    body_seconds: Annotated[Seconds, Meta(description="How long a head may take to arrive, and a body")] = 30.0
    unread_seconds: Annotated[Seconds, Meta(description="How long a client may read nothing of its answer")] = 60.0
    stalled_seconds: Annotated[Seconds, Meta(description="/health says 503 when a step takes longer")] = 60.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="What is logged: this and worse")] = (
        "info"
    )
    deadline_seconds: Annotated[Seconds, Meta(description="How long a call may take; None: as long as it takes")] | None = None
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30, description="Bytes of a body")] = 8 << 20
    max_calls: Annotated[int, Meta(ge=1, le=1 << 20, description="Calls at once")] = 512
    max_prompts: Annotated[int, Meta(ge=1, le=1 << 16, description="Prompts in one call")] = 128

    error: ClassVar[type[PageforkError]] = ConfigError
    foreign: ClassVar[dict[str, str]] = {}
    noun: ClassVar[str] = "setting"

    def __post_init__(self) -> None:
        self.check_fields()

    def api_key(self) -> str | None:
        """The API key; None where nobody has to show one. Raises ConfigError where there has to be one, and is none."""
        key = os.environ.get(KEY_VARIABLE) if self.api_key_file is None else read_secret(Path(self.api_key_file))
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise ConfigError("the API key has to be printable ASCII, as it is sent in a header")
        if key is None and not is_loopback(self.host):
            raise ConfigError(
                f"host={self.host!r} can be reached from other machines: give an API key (api_key_file, or {KEY_VARIABLE} "
                "in the environment)"
            )
        return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a bind address; of names, localhost alone is known to be one."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""The gateway's process: from its configuration to a server that drains on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from pagefork.chat_template import ChatTemplate
from pagefork.client.async_client import AsyncClient
from pagefork.scheduler.errors import ConfigError, InvalidRequestError, PageforkError, ServiceError
from pagefork.server.child import Parent, hold_standard_streams
from pagefork.server.keys import read_secret
from pagefork.server.logs import Lines, log, warn
from pagefork.tokenizer import Tokenizer
from pagefork.wire import Code, Welcome

from .app import make_app
from .config import GatewayConfig
from .connection import connections
from .gateway import Gateway

logger = logging.getLogger("pagefork")

_REFUSED, _FAILED = 2, 1  # exit codes
_BACKLOG = 1024
_LAST_SECONDS = 2  # what answers get to tell of their end, after they were told to end
_KEEP_ALIVE_SECONDS = 30
_REACH_SECONDS = 5.0  # how long a call waits for an engine that is not there


def main() -> NoReturn:
    """Serve until a signal, the parent's death, or a failure. What can't be served is told to the parent."""
    hold_standard_streams()
    parent = Parent()
    try:
        config = parent.read(GatewayConfig)
    except EOFError:
        os._exit(_FAILED)
    except ConfigError as error:
        parent.tell(error=str(error), kind="ConfigError")
        os._exit(_REFUSED)
    lines = Lines(config.log_level)
    code = _FAILED
    parent.watch(lambda: os._exit(_FAILED))
    try:
        asyncio.run(_serve(config, parent))
        code = 0
    except PageforkError as error:
        parent.tell(error=str(error), kind=type(error).__name__)
        code = _REFUSED
    except BaseException as error:
        logger.critical("gateway.failed", exc_info=error, extra={"fields": {}})
        parent.tell(error=f"{type(error).__name__}: {error}", kind="PageforkError")
    finally:
        lines.close()
        os._exit(code)  # a thread that tokenises must not hold up the end


async def _serve(config: GatewayConfig, parent: Parent) -> None:
    api_key = config.api_key()
    tokenizer = Tokenizer.load(Path(config.model_directory))
    chat = _chat(config)
    listening = _listen(config.host, config.port)
    client = _client(config)
    try:
        gateway = Gateway(config, client, await _connect(client, config.connect_seconds), tokenizer, chat)
        await _run(gateway, make_app(gateway, api_key), listening, parent)
    finally:
        await client.close()
    log("gateway.ended")


async def _run(gateway: Gateway, app: ASGIApp, listening: socket.socket, parent: Parent) -> None:
    pulse = asyncio.create_task(gateway.pulse())
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    await gateway.heard.wait()
    log("gateway.ready", url=url, pid=os.getpid())
    parent.tell(url=url, host=host, port=port)
    try:
        await _Server(gateway, app).serve([listening])
    finally:
        pulse.cancel()


async def _connect(client: AsyncClient, seconds: float) -> Welcome:
    """Wait for the engine. Raises ServiceError."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await client.connect()
        except ServiceError as error:
            if error.code != Code.ENGINE_LOST or asyncio.get_running_loop().time() >= end:
                raise


class _Server(uvicorn.Server):
    """Ends in its own way: open answers get drain_seconds, then each is told that the server stops."""

    def __init__(self, gateway: Gateway, app: ASGIApp) -> None:
        drain = gateway.config.drain_seconds
        super().__init__(
            uvicorn.Config(
                app,
                http=connections(gateway.config.unread_seconds, gateway.config.body_seconds),
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(drain) + 1 + _LAST_SECONDS,
            )
        )
        self._gateway = gateway

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Instead of uvicorn's handlers, which end with the signal that they caught."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        if not self._gateway.draining:
            log("gateway.stopping", drain_seconds=self._gateway.config.drain_seconds)
            self._gateway.draining = True
            self.should_exit = True
            asyncio.get_running_loop().call_later(self._gateway.config.drain_seconds, self._gateway.stopping.set)


def _chat(config: GatewayConfig) -> ChatTemplate | None:
    """The given template, else the checkpoint's; None where there is neither. Raises ConfigError, or ModelError for a bad one."""
    chat = ChatTemplate.load(Path(config.model_directory))
    if (file := config.chat_template) is not None:
        try:
            chat = ChatTemplate({"default": Path(file).read_text(encoding="utf-8")}, chat.special_tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} can't be read: {error}") from None
    if not chat.templates:
        return None
    try:
        chat.render([{"role": "user", "content": "Hello"}])
    except InvalidRequestError as error:  # it may take other conversations
        warn("gateway.chat_template", error=str(error))
    return chat


def _client(config: GatewayConfig) -> AsyncClient:
    return AsyncClient(
        config.endpoint,
        token=None if config.token_file is None else read_secret(Path(config.token_file)),
        server_key=config.server_key_file,
        key=config.key_file,
        name="http",
        connect_timeout=_REACH_SECONDS,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError."""
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(f"host={host!r} and port={port} can't be bound: {error.strerror}") from None
    return found

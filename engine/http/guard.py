"""What every request passes before it reaches a route: its id and log line, the Host, the API key, how many there are."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagefork.server.logs import log

from .config import GatewayConfig
from .errors import ApiError

logger = logging.getLogger("pagefork")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_WITHOUT_KEY = {"/health"}


class Guard:
    """An ASGI application around another one. api_key: None where nobody is asked for one."""

    def __init__(self, app: ASGIApp, config: GatewayConfig, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = {"localhost", "127.0.0.1", "::1", config.host.lower(), *(name.lower() for name in config.allowed_hosts)}
        self._calls = 0
        self._max_calls = config.max_calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        answer = _Answering(send, given if _ID.fullmatch(given) else secrets.token_hex(12))
        scope.setdefault("state", {})
        counted = scope["method"] == "POST"  # a full house must not fail the questions of how it is
        self._calls += counted
        try:
            self._check(scope, headers)
            await self._app(scope, receive, answer.send)
        except Exception as error:  # noqa: BLE001 - a bug is answered like every other error
            await answer.fail(error, scope, receive)
        finally:
            self._calls -= counted
            answer.log(scope)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError for who may not come in."""
        hosts = headers.getlist("host")
        if "*" not in self._hosts and (len(hosts) != 1 or _without_port(hosts[0]) not in self._hosts):
            raise ApiError(
                400, f"the Host {', '.join(hosts)[:80]!r} is not one of this server (--allowed-hosts)", code="invalid_host"
            )
        if self._key is not None and scope["path"] not in _WITHOUT_KEY:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
                message = "the API key is missing or wrong: Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if scope["method"] == "POST" and self._calls > self._max_calls:
            raise ApiError(429, f"{self._max_calls} calls are under way", code="too_many_calls", headers={"retry-after": "1"})


class _Answering:
    """What is known of the answer while it is sent."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self._began = time.monotonic()
        self._status: int | None = None
        self._ended = False
        self._error: str | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, error: Exception, scope: Scope, receive: Receive) -> None:
        """Answer with an error, while there is no other answer."""
        if not isinstance(error, ApiError):
            logger.error("http.bug", exc_info=error, extra={"fields": {"request": self._request_id}})
            error = ApiError(500, "the server failed; its log says why", code="internal")
        self._error = error.message
        if self._status is None:
            await error.response()(scope, receive, self.send)

    def log(self, scope: Scope) -> None:
        """One line for the request. 499: its client left before the answer was complete."""
        state: dict[str, Any] = scope["state"]
        fields = {
            "request": self._request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": self._status if self._ended else 499,
            "ms": round((time.monotonic() - self._began) * 1000, 1),
            "call": state.get("call"),
            "error": state.get("error") or self._error,
        }
        log("http.request", **{name: value for name, value in fields.items() if value is not None})


def _without_port(host: str) -> str:
    """The name or address of a Host header."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name

"""The routes, and the errors of all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

import pagefork
from pagefork.scheduler.errors import InvalidRequestError, ServiceError

from .answers import Answer
from .body import read_json
from .chat import Chat
from .completions import Completions
from .errors import ApiError, json_response
from .gateway import Gateway
from .guard import Guard
from .metrics import render
from .openapi import document
from .refusals import as_api_error
from .schemas import Health, Model, ModelList, Version
from .tokens import detokenize, tokenize

Endpoint = Callable[[Request], Awaitable[Any]]


class Routes:
    """The routes of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def listed(self) -> list[Route]:
        """For Starlette."""
        posts: dict[str, Endpoint] = {
            "/v1/completions": self._answering(Completions.read),
            "/v1/chat/completions": self._answering(Chat.read),
            "/tokenize": self._replying(tokenize),
            "/detokenize": self._replying(detokenize),
        }
        gets: dict[str, Endpoint] = {
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.model,
            "/health": self.health,
            "/metrics": self.metrics,
            "/version": self.version,
            "/openapi.json": self.openapi,
        }
        return [
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()),
        ]

    async def models(self, request: Request) -> Response:
        return json_response(ModelList(data=[self._model(name) for name in self._gateway.config.model_names]))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._gateway.check_model(name)
        return json_response(self._model(name))

    async def health(self, request: Request) -> Response:
        """Whether requests would be served: what the engine said last, and how long its step takes."""
        trouble, pong = self._gateway.trouble(), self._gateway.pong
        known = {} if pong is None else {name: getattr(pong, name) for name in _PONG}
        headers = {"cache-control": "no-store"} | ({} if trouble is None else {"retry-after": "1"})
        return json_response(Health(status=trouble or "running", **known), 200 if trouble is None else 503, headers)

    async def metrics(self, request: Request) -> Response:
        self._gateway.check_reachable()
        page = render(await self._gateway.client.stats(), self._gateway.config.model_names[0])
        return Response(page, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    async def version(self, request: Request) -> Response:
        return json_response(Version(version=pagefork.__version__))

    async def openapi(self, request: Request) -> Response:
        return json_response(document())

    def _model(self, name: str) -> Model:
        return Model(id=name, created=self._gateway.started, max_model_len=self._gateway.welcome.max_model_len)

    async def _body(self, request: Request) -> dict[str, Any]:
        if self._gateway.draining:
            raise ApiError(503, "the server is draining", code="draining", headers={"retry-after": "1", "connection": "close"})
        self._gateway.check_reachable()
        return await read_json(request, self._gateway.config.max_body_bytes, self._gateway.config.body_seconds)

    def _answering(self, read: Callable[[Gateway, dict[str, Any]], Awaitable[Any]]) -> Endpoint:
        async def endpoint(request: Request) -> Answer:
            return Answer(self._gateway, await read(self._gateway, await self._body(request)))

        return endpoint

    def _replying(self, reply: Callable[[Gateway, dict[str, Any]], Awaitable[msgspec.Struct]]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            return json_response(await reply(self._gateway, await self._body(request)))

        return endpoint


_PONG = ("running", "waiting", "free_blocks", "last_step_age_ms")


def make_app(gateway: Gateway, api_key: str | None) -> ASGIApp:
    """The whole application."""
    app = Starlette(
        routes=Routes(gateway).listed(),
        exception_handlers={
            ApiError: _told,
            InvalidRequestError: _told,
            ServiceError: _told,
            HTTPException: _http_error,
            RecursionError: _too_deep,
            Exception: _bug,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, gateway.config, api_key)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError | InvalidRequestError | ServiceError)
    told = as_api_error(error)
    request.scope["state"]["error"] = told.message
    return told.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such route", 405: "the route has another method"}.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _too_deep(request: Request, error: Exception) -> Response:
    return ApiError(400, "the body is nested too deeply", code="invalid_json").response()


async def _bug(request: Request, error: Exception) -> Response:
    """The guard, which the error reaches as well, logs it."""
    return ApiError(500, "the server failed; its log says why", code="internal").response()

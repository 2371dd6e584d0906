"""The services that `bench serve` can drive: an engine over ZeroMQ, and an OpenAI-compatible server over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pagefork.cli.serving_load import Answer, Ask, Target
from pagefork.scheduler.errors import ConfigError, InvalidRequestError, ServiceError
from pagefork.scheduler.params import CommonParams

if TYPE_CHECKING:
    import httpx

    from pagefork import AsyncClient
    from pagefork.wire import Welcome

T = TypeVar("T")
ParamsOf = Callable[[int], CommonParams]  # for a number of tokens
Json = dict[str, Any]

_POLL = 0.5  # seconds between two looks whether a service is there
_CONNECT = 10.0  # seconds of an HTTP connection
_GREETING = 3.0  # seconds in which a running engine says Welcome


class EngineTarget:
    """An engine over ZeroMQ."""

    def __init__(self, client: AsyncClient, welcome: Welcome, params_of: ParamsOf) -> None:
        self.model: str = welcome.model
        self.vocab_size: int | None = welcome.vocab_size
        self.max_model_len: int | None = welcome.max_model_len
        self._client, self._params_of = client, params_of

    async def ask(self, ask: Ask, answer: Answer) -> None:
        """Send a request and read its answer to the end. Raises ServiceError."""
        try:
            async with self._client.stream(ask.prompt, self._params_of(ask.output_len)) as stream:
                async for delta in stream:
                    if delta.tokens:
                        answer.arrived(delta.index)
                result = await stream.result()
        except InvalidRequestError as error:
            raise ServiceError("INVALID_ARGUMENT", str(error)) from None
        answer.prompt_tokens = len(result.prompt_token_ids)
        answer.tokens = sum(len(output.token_ids) for output in result.outputs)
        answer.text = result.outputs[0].text if result.outputs else ""


class HttpTarget:
    """A server of OpenAI's completions, streamed as server-sent events."""

    vocab_size: int | None = None

    def __init__(self, http: httpx.AsyncClient, endpoint: str, card: Json, body: Json) -> None:
        """card: what the server says of the model. body: what every request has beside its prompt and its length."""
        self.model: str = card["id"]
        self.max_model_len: int | None = card.get("max_model_len")
        self._http, self._endpoint = http, endpoint
        self._body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}

    async def ask(self, ask: Ask, answer: Answer) -> None:
        """Send a request and read its answer to the end. Raises ServiceError."""
        import httpx

        body = {**self._body, "prompt": ask.prompt, "max_tokens": ask.output_len}
        chunks = 0
        try:
            async with self._http.stream("POST", self._endpoint, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refusal(response.status_code, await response.aread())
                async for event in _events(response.aiter_lines()):
                    for choice in event.get("choices") or ():
                        if choice.get("text"):
                            chunks += 1
                            output = choice.get("index", 0)
                            answer.arrived(output)
                            answer.text += choice["text"] if output == 0 else ""
                    if usage := event.get("usage"):
                        answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        except httpx.HTTPError as error:
            raise ServiceError("ENGINE_LOST", str(error) or type(error).__name__) from None
        answer.tokens = answer.tokens or chunks


@asynccontextmanager
async def engine_target(
    address: str, keys: tuple[str | None, str | None], model: str | None, patience: float, params_of: ParamsOf
) -> AsyncIterator[Target]:
    """Connect to an engine by its name or endpoint, within `patience` seconds.

    keys: files with the engine's public key and with this client's own. Raises ServiceError when there is no engine,
    InvalidRequestError when it runs another model.
    """
    from pagefork import AsyncClient

    server_key, key = keys
    seconds = max(_GREETING, patience)
    async with AsyncClient(address, server_key=server_key, key=key, name="bench", connect_timeout=seconds) as client:
        welcome = client.welcome
        assert welcome is not None
        if model not in (None, welcome.model):
            raise InvalidRequestError(f"model={model!r} is not what {address} runs, which is {welcome.model!r}")
        yield EngineTarget(client, welcome, params_of)


@asynccontextmanager
async def http_target(base_url: str, endpoint: str, model: str | None, patience: float, body: Json) -> AsyncIterator[Target]:
    """Ask a server for its models, and try again for `patience` seconds.

    The API key is that of the environment's PAGEFORK_API_KEY or OPENAI_API_KEY. Raises ServiceError when there is no server,
    InvalidRequestError when it does not have the model; None is its first one.
    """
    try:
        import httpx
    except ImportError:
        raise ConfigError(
            "--backend openai speaks HTTP with httpx, which is not installed: pip install 'pagefork[bench]'"
        ) from None
    key = os.environ.get("PAGEFORK_API_KEY") or os.environ.get("OPENAI_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(None, connect=_CONNECT)
    async with httpx.AsyncClient(base_url=base_url, headers=headers, limits=limits, timeout=timeout) as http:

        async def cards() -> list[Json]:
            try:
                response = await http.get("/v1/models", timeout=_CONNECT)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ServiceError("ENGINE_LOST", f"{base_url}: {error or type(error).__name__}") from None
            if response.status_code != httpx.codes.OK:
                raise _refusal(response.status_code, response.content)
            found: list[Json] = _json(response.content).get("data") or []
            return found

        known = await _patiently(cards, patience)
        card = next((card for card in known if model in (None, card["id"])), None)
        if card is None:
            names = ", ".join(card["id"] for card in known) or "none"
            raise InvalidRequestError(f"model={model!r} is not served at {base_url}, which has {names}")
        yield HttpTarget(http, endpoint, card, body)


async def _patiently(attempt: Callable[[], Awaitable[T]], patience: float) -> T:
    """What `attempt` returns; its ServiceError once `patience` seconds have passed."""
    end = time.monotonic() + patience
    while True:
        try:
            return await attempt()
        except ServiceError:
            if time.monotonic() >= end:
                raise
        await asyncio.sleep(_POLL)


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[Json]:
    """The objects of server-sent events. Raises ServiceError for one that is an error, and for a stream that breaks off."""
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = _json(data)
        if "error" in event:
            raise _told(event["error"], "INTERNAL")
        yield event
    raise ServiceError("ENGINE_LOST", "the answer broke off")


def _refusal(status: int, body: bytes) -> ServiceError:
    return _told(_json(body).get("error"), f"HTTP_{status}")


def _told(error: Any, code: str) -> ServiceError:
    """What a server says went wrong: an object of OpenAI's shape, or whatever it is."""
    if not isinstance(error, dict):
        return ServiceError(code, str(error or "no reason is given"))
    return ServiceError(str(error.get("code") or code).upper(), str(error.get("message") or error))


def _json(data: str | bytes) -> Json:
    """A JSON object; an empty one for anything else."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}

"""The OpenAPI description of the routes, made of the Structs that read and write their bodies."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

import pagefork

from .fields import CHAT, COMPLETION
from .schemas import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Detokenized,
    DetokenizeRequest,
    ErrorBody,
    Health,
    Model,
    ModelList,
    Tokenized,
    TokenizeRequest,
    Version,
)

_POSTS = {
    "/v1/completions": (COMPLETION.struct, Completion, Completion, "Complete texts"),
    "/v1/chat/completions": (CHAT.struct, ChatCompletion, ChatChunk, "Answer a conversation"),
    "/tokenize": (TokenizeRequest, Tokenized, None, "Text to token ids"),
    "/detokenize": (DetokenizeRequest, Detokenized, None, "Token ids to text"),
}
_GETS = {
    "/v1/models": (ModelList, "The models that are served"),
    "/v1/models/{model}": (Model, "One of them"),
    "/health": (Health, "Whether requests would be served; needs no key"),
    "/metrics": (None, "Numbers for Prometheus"),
    "/version": (Version, "The version of the server"),
    "/openapi.json": (None, "This document"),
}
_REFUSALS = {
    "400": "The request can't be honoured; `param` names the field",
    "401": "No API key, or a wrong one",
    "404": "No such model",
    "408": "The body did not arrive, or the answer was not read",
    "413": "The body is too large",
    "415": "The body is no application/json",
    "429": "Too many requests; Retry-After says when to come again",
    "500": "The server failed",
    "503": "The server is draining, or its engine is lost",
    "504": "The deadline of the server passed",
}
_REF = "#/components/schemas/{name}"


@cache
def document() -> dict[str, Any]:
    """The description, as JSON has it."""
    structs = [struct for row in _POSTS.values() for struct in row[:3] if struct is not None]
    structs += [struct for struct, _ in _GETS.values() if struct is not None]
    structs = [*dict.fromkeys(structs), ErrorBody]
    schemas, components = msgspec.json.schema_components(structs, ref_template=_REF)
    by_struct = dict(zip(structs, schemas, strict=True))
    error = _content(by_struct[ErrorBody])
    paths: dict[str, Any] = {}
    for path, (body, answer, event, summary) in _POSTS.items():
        paths[path] = {"post": _operation(summary, _content(by_struct[answer]), error)}
        paths[path]["post"]["requestBody"] = {"required": True, "content": _content(by_struct[body])}
        if event is not None:
            paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    for path, (found, summary) in _GETS.items():
        content = _content(by_struct[found]) if found is not None else {}
        paths[path] = {"get": _operation(summary, content, error)}
    paths["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    paths["/openapi.json"]["get"]["responses"]["200"]["content"] = _content({"type": "object"})
    paths["/health"]["get"]["responses"]["503"]["content"] = _content(by_struct[Health])
    parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{model}"]["get"]["parameters"] = [parameter]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pagefork", "version": pagefork.__version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def _operation(summary: str, content: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    refusals = {status: {"description": meaning, "content": dict(error)} for status, meaning in _REFUSALS.items()}
    return {"summary": summary, "responses": {"200": {"description": "Done", "content": content}, **refusals}}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}

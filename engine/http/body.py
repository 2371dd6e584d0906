"""The body of a request: read with a bound, and JSON to the letter."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from .errors import ApiError

_LARGEST = 2**63


async def read_json(request: Request, max_bytes: int, seconds: float) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises ApiError: 415 for another media type, 413 above max_bytes, 408 when it takes longer than `seconds` to arrive, 400
    for what is no JSON object in UTF-8, or has duplicate names, a number beyond 64 bits, or a lone surrogate.
    """
    _check_type(request)
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", headers={"connection": "close"}) from None
    return parse_object(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiError (400) as read_json does."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _refused(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        value = _decoder.decode(text)
    except RecursionError:
        raise _refused("it is nested too deeply") from None
    except ValueError as error:
        raise _refused(str(error)) from None
    if not isinstance(value, dict):
        raise _refused("it is no object")
    if "\\ud" in text.lower() and not _is_unicode(value):
        raise _refused("it holds a lone surrogate, which is no character")
    return value


def _check_type(request: Request) -> None:
    kind, *parameters = request.headers.get("content-type", "").lower().replace(" ", "").split(";")
    if kind != "application/json" or not set(parameters) <= {"charset=utf-8", 'charset="utf-8"', ""}:
        raise ApiError(415, "the Content-Type has to be application/json, in UTF-8", headers={"accept": "application/json"})
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "a Content-Encoding is not supported", headers={"accept-encoding": "identity"})


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    body = bytearray()
    if not announced.isdecimal() or int(announced) <= max_bytes:
        try:
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    break
            else:
                return bytes(body)
        except ClientDisconnect:
            raise ApiError(400, "the body is incomplete") from None
    raise ApiError(413, f"a body has at most {max_bytes} bytes", headers={"connection": "close"})


def _refused(reason: str) -> ApiError:
    return ApiError(400, f"the body can't be read: {reason}", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate name {twice!r:.80}")
    return found


def _integer(text: str) -> int:
    if len(text) < 21 and -_LARGEST <= (value := int(text)) < _LARGEST:
        return value
    raise ValueError(f"{text[:24]}... is beyond 64 bits" if len(text) > 24 else f"{text} is beyond 64 bits")


def _float(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{text[:24]} is beyond 64 bits")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_no_number)

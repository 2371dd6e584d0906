"""Which answer an error of the engine or its service becomes."""

from __future__ import annotations

import math
import re

from pagefork.scheduler.errors import InvalidRequestError, ServiceError
from pagefork.wire import Code

from .errors import ApiError
from .fields import CHAT, COMPLETION, SEARCHES

Refusal = ApiError | InvalidRequestError | ServiceError

_STATUS: dict[str, int] = {
    Code.INVALID_ARGUMENT: 400,
    Code.TOO_LARGE: 400,
    Code.QUEUE_FULL: 429,
    Code.DRAINING: 503,
    Code.DEADLINE: 504,
    Code.CANCELLED: 503,  # a client that cancels is not there to read this
    Code.CLIENT_STALLED: 408,
    Code.BUDGET_EXCEEDED: 400,
    Code.KV_EXHAUSTED: 400,
    Code.NO_TOKEN: 400,
    Code.VALUE_FUNCTION: 400,
    Code.ENGINE_LOST: 503,
}  # all others: 500
_NAMED = re.compile(r"\b([a-z_]+)(?==|\[| has | holds )|(?:parameter|field) '([a-z_]+)'")
_FIELDS = {*COMPLETION.uses, *CHAT.uses, *(name for cls in SEARCHES.values() for name in cls.__struct_fields__)}


def as_api_error(error: Refusal) -> ApiError:
    """The answer that tells of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ServiceError):
        return _of_service(error)
    return ApiError(400, str(error), param=named_in(str(error)), code="invalid_argument")


def named_in(message: str) -> str | None:
    """The field that a message speaks of: our messages say `name=value`, `name has ...` or `parameter 'name'`."""
    found = (match[1] or match[2] for match in _NAMED.finditer(message))
    return next((name for name in found if name in _FIELDS), None)


def _of_service(error: ServiceError) -> ApiError:
    status = _STATUS.get(error.code, 500)
    headers = {}
    if status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil((error.retry_after_ms or 0) / 1000)))
    param = named_in(error.message) if status == 400 else None
    return ApiError(status, error.message, param=param, code=error.code.lower(), headers=headers)

"""From what a user passes to the frames of a Submit, or an error that says why not."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import msgspec

from pagefork.scheduler.errors import ConfigError, InvalidRequestError, ServiceError
from pagefork.scheduler.params import CommonParams
from pagefork.wire import (
    MAX_FRAME,
    Attach,
    Code,
    Hello,
    Submit,
    WireError,
    decode_from_client,
    encode,
    encode_params,
    encode_tokens,
)

Prompt = str | Sequence[int]


class Submission(NamedTuple):
    """A request that can be sent. text, token_ids: the prompt, as one or the other. deadline: seconds; until: when it ends."""

    rid: str
    frames: list[bytes]
    text: str | None
    token_ids: list[int]
    credit: int
    deadline: float | None
    until: float = math.inf

    def again(self) -> Submission:
        """For one more attempt, with what is left of its deadline."""
        if self.deadline is None:
            return self
        message, blob = decode_from_client(self.frames)
        assert isinstance(message, Submit)
        left = max(self.until - time.monotonic(), 0.001)
        message = msgspec.structs.replace(message, deadline_ms=_milliseconds(left))
        return self._replace(frames=encode(message, blob), deadline=left)


def submission(
    rid: str,
    prompt: Any,
    params: CommonParams | None,
    *,
    priority: int,
    deadline: float | None,
    credit: int,
    stream: bool,
) -> Submission:
    """Check and encode a request. Raises InvalidRequestError, and ServiceError (TOO_LARGE) for what is longer than a frame."""
    if not isinstance(params, CommonParams | None):
        raise InvalidRequestError(f"params must be parameters of a strategy or None, got {type(params).__name__}")
    text = str.__str__(prompt) if isinstance(prompt, str) else None  # no subclass, as NumPy has one
    token_ids = [] if text is not None else _tokens(prompt)
    message = Submit(
        rid=rid,
        params=encode_params(params),
        text=text,
        priority=priority,
        deadline_ms=_milliseconds(deadline),
        credit=credit,
        stream=stream,
    )
    try:
        frames = encode(message, None if text is not None else encode_tokens(token_ids))
    except (UnicodeEncodeError, OverflowError) as error:
        raise InvalidRequestError(f"the request can't be sent: {error}") from None
    if (size := max(map(len, frames))) > MAX_FRAME:
        raise ServiceError(Code.TOO_LARGE, f"the request has a frame of {size} bytes; {MAX_FRAME} are allowed")
    _check(frames)
    until = math.inf if deadline is None else time.monotonic() + deadline
    return Submission(rid, frames, text, token_ids, credit, deadline, until)


def attachable(request_id: str) -> None:
    """Raise InvalidRequestError for what is no id: the engine would not say which request it refuses."""
    _check(encode(Attach(rid=request_id)))


def greetable(name: str, token: str | None, session: bytes | None) -> None:
    """Raise ConfigError for what no Hello can say."""
    try:
        decode_from_client(encode(Hello(client=name, token=token, session=session)))
    except WireError as error:
        raise ConfigError(f"name, token or session can't be sent: {error}") from None


def listed(prompts: Any) -> tuple[list[Any], bool]:
    """Prompts as a list, and whether one alone was given. Raises InvalidRequestError."""
    if isinstance(prompts, str):
        return [prompts], True
    if hasattr(prompts, "tolist"):  # an array
        prompts = prompts.tolist()
    if isinstance(prompts, bytes | bytearray | Mapping | Set) or not isinstance(prompts, Iterable):
        raise InvalidRequestError(f"prompts must be a text, token ids or a list of either, got {type(prompts).__name__}")
    found = list(prompts)
    if not found:
        raise InvalidRequestError("prompts is empty; give a text, token ids or a list of either")
    if all(hasattr(item, "__index__") for item in found):
        return [found], True
    return found, False


def one_each(given: Any, count: int) -> list[Any]:
    """A list of parameters, whether one for all or one for each were given."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise InvalidRequestError(f"{len(given)} params for {count} prompts; give one for all, or one for each")
    return list(given)


def _check(frames: list[bytes]) -> None:
    """Raise InvalidRequestError where the engine would refuse a field for its type or range."""
    try:
        decode_from_client(frames)
    except WireError as error:
        raise InvalidRequestError(str(error)) from None


def _tokens(prompt: Any) -> list[int]:
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, bytes | bytearray | Mapping | Set) or not isinstance(prompt, Iterable):
        raise InvalidRequestError(f"a prompt is a text or a list of token ids, got {type(prompt).__name__}")
    return list(prompt)


def _milliseconds(deadline: float | None) -> int | None:
    if deadline is None:
        return None
    if not isinstance(deadline, int | float) or not 0 < deadline <= 2**31 / 1000 - 1:
        raise InvalidRequestError(f"deadline={deadline!r} must be seconds above 0, at most {2**31 // 1000 - 1}")
    return math.ceil(deadline * 1000)

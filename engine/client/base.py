"""What Client and AsyncClient have in common."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagefork.endpoint import find
from pagefork.outputs import RequestMetrics, RequestOutput
from pagefork.scheduler.errors import ConfigError, InvalidRequestError, ServiceError
from pagefork.scheduler.params import CommonParams
from pagefork.wire import Code, Ping, Stats, Welcome

from .connection import Connection, Curve, Post
from .prompts import Submission, attachable, greetable, listed, one_each, submission
from .reading import Reading
from .request import Event, Sink
from .state import Ask, ClientState

if TYPE_CHECKING:
    from .async_stream import AsyncStream
    from .stream import Stream

logger = logging.getLogger("pagefork")

_PAUSE = 0.05  # seconds before a full queue is tried again, where it named none
_AT_ONCE = 128  # requests that a full queue refused are tried again


class Base:
    """A connection, and requests over it."""

    def __init__(
        self,
        post: Post,
        address: str,
        token: str | None,
        server_key: str | None,
        key: str | None,
        name: str,
        session: bytes | None,
        connect_timeout: float,
        reconnect_timeout: float,
        window: int,
    ) -> None:
        find(address)  # refuses what is no address
        greetable(name, token, session)
        if not isinstance(window, int) or not 1 <= window < 2**20:
            raise ConfigError(f"window={window} must be a number of tokens from 1 to {2**20 - 1}")
        for what, seconds in (("connect_timeout", connect_timeout), ("reconnect_timeout", reconnect_timeout)):
            if not seconds > 0:
                raise ConfigError(f"{what}={seconds} must be seconds above 0")
        self._window = window
        self._ids = itertools.count()
        self._prefix = secrets.token_hex(6)
        self._state = ClientState(
            name=name, session=session, connect_timeout=connect_timeout, reconnect_timeout=reconnect_timeout
        )
        self._connection = Connection(address, token, _curve(server_key, key), self._state, post)
        self._finalizer = weakref.finalize(self, self._connection.close)

    @property
    def welcome(self) -> Welcome | None:
        """What the engine said of itself and its limits when it was connected last; None before."""
        return self._state.welcome

    @property
    def session(self) -> bytes | None:
        """The secret that another client can go on with, to attach to this one's requests."""
        return self._state.session

    def _ask(self, kind: type[Stats | Ping] | None) -> Future[Any]:
        future: Future[Any] = Future()
        ask = Ask(kind, future)
        self._connection.command(lambda state: state.ask(ask))
        return future

    def _submission(
        self,
        prompt: Any,
        params: CommonParams | None,
        request_id: str | None,
        priority: int,
        deadline: float | None,
        stream: bool,
    ) -> Submission:
        self._connection.check()
        rid = f"{self._prefix}-{next(self._ids)}" if request_id is None else request_id
        return submission(
            rid, prompt, params, priority=priority, deadline=deadline, credit=self._window if stream else 0, stream=stream
        )

    def _submissions(
        self, prompts: Any, params: Any, request_id: str | None, priority: int, deadline: float | None
    ) -> tuple[list[Submission], bool]:
        """What generate() is to send, and whether one prompt alone was given."""
        found, alone = listed(prompts)
        if request_id is not None and not alone:
            raise InvalidRequestError("request_id names one request; leave it out for a list of prompts")
        each = zip(found, one_each(params, len(found)), strict=True)
        return [self._submission(prompt, one, request_id, priority, deadline, stream=False) for prompt, one in each], alone

    def _outcome(self, error: ServiceError, made: Submission, at_once: bool) -> RequestOutput | float:
        """What becomes of one of several requests that failed: its output with the error, or seconds to try again after.

        at_once: what was heard of a full queue is old, and a request before this one has ended.

        Raises an error that is about all of them.
        """
        if _is_full(error):
            if (left := made.until - time.monotonic()) > 0:
                return 0.0 if at_once else min((error.retry_after_ms or 0) / 1e3 or _PAUSE, left)
            error = ServiceError(Code.DEADLINE, f"there was no room for it before its deadline: {error.message}")
            error.output = RequestOutput(
                request_id=made.rid,
                prompt=made.text,
                prompt_token_ids=made.token_ids,
                outputs=[],
                finished=True,
                metrics=RequestMetrics(arrival_time=time.monotonic()),
            )
        if isinstance(error.output, RequestOutput) and error.output.finished:
            output, error.output = error.output, None
            output.error = error
            logger.error("request %s failed: %s", output.request_id, error)
            return output
        raise error

    def _again(self, streams: Sequence[Stream | AsyncStream], number: int) -> list[int]:
        """Which of several requests to send again when there may be room: this one, and later ones that were refused with it."""
        later = (one for one in range(number + 1, len(streams)) if _is_full(streams[one].unread))
        return [number, *itertools.islice(later, _AT_ONCE - 1)]

    def _attachment(self, request_id: str) -> Submission:
        self._connection.check()
        attachable(request_id)
        return Submission(request_id, [], None, [], self._window, None)

    def _reading(self, made: Submission, sink: Sink) -> Reading:
        connection, rid = self._connection, made.rid

        def credit(upto: int) -> None:
            connection.later(lambda state: state.credit(rid, upto, sink))

        return Reading(rid, made.text, made.token_ids, self._window, credit)

    def _send(self, made: Submission, sink: Sink) -> None:
        rid, frames, credit, deadline = made.rid, made.frames, made.credit, made.deadline
        self._connection.command(lambda state: state.submit(rid, frames, sink, credit, deadline))


def deliver(events: Sequence[tuple[Sink, Event]]) -> None:
    """Give events to those whom they are for."""
    for sink, event in events:
        sink.put(event)


def _is_full(event: Event | None) -> bool:
    """Whether there was no room for a request."""
    return isinstance(event, ServiceError) and event.code == Code.QUEUE_FULL and event.retry_safe


def _curve(server_key: str | None, key: str | None) -> Curve | None:
    if server_key is None and key is None:
        return None
    if server_key is None or key is None:
        raise ConfigError("server_key and key belong together: files with the engine's public key and with this client's own")
    from pagefork.server.keys import read_key_pair, read_public_key

    return Curve(read_public_key(Path(server_key)), *read_key_pair(Path(key)))

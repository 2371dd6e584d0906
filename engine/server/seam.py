"""What lies between the service's rules, which do no input and output, and the sockets and threads around them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import msgspec

from pagefork.engine_thread import Moment
from pagefork.outputs import EngineStats
from pagefork.scheduler.params import CommonParams


class Sent(Enum):
    """What became of a message that was to be sent."""

    OK = "ok"
    FULL = "full"  # the peer does not read; try again later
    GONE = "gone"  # there is no such peer any more


Send = Callable[[bytes, list[bytes]], Sent]  # routing id and frames; never blocks


class Ticket(Protocol):
    """A request under way, as the engine's side knows it. `request_id` is unique and made by the service."""

    @property
    def request_id(self) -> str: ...


class Gate(Protocol):
    """The engine, as the service sees it. No method blocks; what comes of add() is delivered as events for the ticket.

    Events are Queued (accepted), RequestOutput (cumulative, the last with `finished`) and, instead of all of these, the
    exception that refused the request. A later one stands for those before it, so some are never seen.
    """

    @property
    def moment(self) -> Moment:
        """The engine after its last step."""

    def add(self, ticket: Ticket, prompt: str | list[int], params: CommonParams | None, **fields: Any) -> None:
        """Tokenise, check and queue a request. fields: priority, salt, max_forward_tokens."""

    def abort(self, ticket: Ticket) -> None:
        """End a request; its last output comes, unless it has come."""

    def discard(self, ticket: Ticket) -> None:
        """End a request of which no event is wanted any more."""

    def stats(self, reply: Callable[[EngineStats], None]) -> None:
        """Call `reply` later, in the service's thread."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What Welcome says of the engine."""

    model: str
    vocab_size: int
    max_model_len: int
    value_functions: list[str] = []


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. docs/protocol.md says what each is for."""

    ping: float = 5.0
    lease: float = 15.0
    grace: float = 5.0
    stall: float = 30.0
    keep: float = 60.0

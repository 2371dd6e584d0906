"""One request as the client's state machine knows it: what was sent, what has come, what may come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from pagefork.scheduler.errors import ServiceError
from pagefork.wire import Accepted, Attach, Delta, Final, Finished, Have

MAX_OUTPUTS = 1 << 16  # as many as Attach has room for


class Arrived(NamedTuple):
    """The terminal message, and the prompt's token ids where they came with it."""

    finished: Finished
    prompt_token_ids: list[int] | None


Event = Accepted | Delta | Arrived | ServiceError  # the last two are terminal


class Sink(Protocol):
    """Whom the events of a request are for: one Accepted at most, Deltas, one terminal."""

    def put(self, event: Event) -> None: ...


class Status(Enum):
    """How far a request has come."""

    UNSENT = "unsent"
    SENT = "sent"  # the engine may have it
    ACCEPTED = "accepted"


@dataclass(slots=True, eq=False)
class Request:
    """frames: its Submit; none for a request of an earlier client, which is attached to. give_up_at: while it is unsent."""

    rid: str
    frames: list[bytes]
    sink: Sink
    credit: int
    give_up_at: float
    deadline: float
    status: Status = Status.UNSENT
    aborted: bool = False
    _have: dict[int, tuple[int, int]] = field(default_factory=dict)  # tokens and characters of each output

    @property
    def has_tokens(self) -> bool:
        """Whether the reader was given any."""
        return any(tokens for tokens, _ in self._have.values())

    def advance(self, part: Delta | Final) -> str | None:
        """Count what has come; a sentence when it does not follow what came before."""
        if not 0 <= part.index < MAX_OUTPUTS:
            return f"the engine sent an output of index {part.index}"
        tokens, characters = self._have.get(part.index, (0, 0))
        if part.start != tokens:
            return f"the engine sent tokens from {part.start} of output {part.index}, where {tokens} are here"
        if part.text_from != characters and (part.text or part.text_from):
            return f"the engine sent text from {part.text_from} of output {part.index}, where {characters} characters are here"
        if part.logprobs and len(part.logprobs) != len(part.tokens):
            return f"the engine sent {len(part.logprobs)} log-probs for {len(part.tokens)} tokens of output {part.index}"
        self._have[part.index] = tokens + len(part.tokens), characters + len(part.text)
        return None

    def attach(self) -> Attach:
        """The message that goes on with it."""
        count = max(self._have, default=-1) + 1
        return Attach(rid=self.rid, have=[Have(*self._have.get(index, (0, 0))) for index in range(count)], credit=self.credit)

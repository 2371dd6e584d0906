"""A request as the scheduler sees it: token ids and parameters, no text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from .params import CommonParams
from .plan import Ints, Spec


class TextRules(Protocol):
    """What the scheduler asks of text without having a tokenizer. States are immutable: forks share them."""

    def start(self) -> Any:
        """The state before the first generated token."""

    def check(self, state: Any, token: int) -> tuple[Any, str | None]:
        """The state after `token`, and the stop text that it completes, if any."""

    def text(self, tokens: list[int], stop: int | str | None = None) -> str:
        """The text of generated tokens, as an output shows it that ended for the stop reason `stop`."""


@dataclass(slots=True)
class Request:
    """One prompt and what to do with it.

    `end_ids` end an output (the model's own, unless ignored, and `params.stop_token_ids`); `limit` is the
    length at which a sequence is full, prompt included; `salt` separates prefix caches. `prompt_logprobs`: score the
    prompt's own tokens, and read so many of the most probable ones at each. `max_forward_tokens`: computed for it, all in
    all; it fails soon after.
    """

    id: str
    prompt: Ints
    params: CommonParams
    spec: Spec
    limit: int
    priority: int = 0
    arrival: int = 0
    end_ids: frozenset[int] = frozenset()
    model_end_ids: frozenset[int] = frozenset()
    rules: TextRules | None = None
    prompt_logprobs: int | None = None
    salt: str = ""
    max_forward_tokens: int = 1 << 62
    extra: dict[str, Any] = field(default_factory=dict)
    room: int = field(init=False)  # tokens that an output can have

    def __post_init__(self) -> None:
        self.room = self.limit - len(self.prompt)

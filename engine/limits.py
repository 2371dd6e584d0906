"""What one client may ask of a service: limits with a default, a setting and a typed error each."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta

from pagefork.scheduler.checking import Checked
from pagefork.scheduler.errors import ConfigError, PageforkError
from pagefork.scheduler.params import CommonParams, SamplingParams

Limit = Annotated[int, Meta(ge=1, le=2**53 - 1)]


class LimitError(PageforkError, ValueError):
    """More was asked for than the service allows."""


class Limits(Checked, frozen=True, kw_only=True):
    """Limits of a service. Raises ConfigError (a ValueError) for an unknown name or a value out of range."""

    max_sessions: Annotated[Limit, Meta(description="Clients at once")] = 256
    max_requests: Annotated[Limit, Meta(description="Requests at once, running and waiting, of all clients")] = 1024
    max_reserved_tokens: Annotated[
        Limit, Meta(description="Prompt tokens of all requests at once; a text counts its bytes until it is tokenised")
    ] = 1 << 24
    max_kept_bytes: Annotated[Limit, Meta(description="Bytes of outputs kept for clients that ask again")] = 64 << 20
    max_forward_tokens: Annotated[
        Limit, Meta(description="Tokens computed for one request, prompt, forks and searches included")
    ] = 1 << 21
    max_text_bytes: Annotated[Limit, Meta(description="UTF-8 bytes of a prompt")] = 4 << 20
    max_trace_bytes: Annotated[Limit, Meta(description="Encoded bytes of a trace; steps beyond are left out")] = 1 << 20
    max_n: Annotated[Limit, Meta(description="n and best_of")] = 128
    max_beam_width: Annotated[Limit, Meta(description="beam_width")] = 4096
    max_num_simulations: Annotated[Limit, Meta(description="num_simulations")] = 4096
    max_tree_depth: Annotated[Limit, Meta(description="max_depth")] = 256
    max_rollout_tokens: Annotated[Limit, Meta(description="rollout_tokens")] = 256
    max_leaf_batch_size: Annotated[Limit, Meta(description="leaf_batch_size")] = 256
    max_candidates: Annotated[Limit, Meta(description="top_k of the searches")] = 256
    max_stop: Annotated[Limit, Meta(description="Texts in stop")] = 16
    max_stop_bytes: Annotated[Limit, Meta(description="UTF-8 bytes of one text in stop or bad_words")] = 256
    max_listed: Annotated[
        Limit, Meta(description="Entries of stop_token_ids, bad_words, allowed_token_ids and logit_bias, each")
    ] = 1024
    max_logprobs: Annotated[Limit, Meta(description="logprobs and prompt_logprobs")] = 20

    error: ClassVar[type[PageforkError]] = ConfigError
    foreign: ClassVar[dict[str, str]] = {}
    noun: ClassVar[str] = "limit"

    def __post_init__(self) -> None:
        self.check_fields()

    def check(self, params: CommonParams) -> None:
        """Raise LimitError for the first parameter that is above its limit."""
        for name, limit in _NUMBERS.items():
            value = getattr(params, name, None)
            # -1 is the whole vocabulary; sampling's top_k is no number of rows
            if value is None or (name == "top_k" and isinstance(params, SamplingParams)):
                continue
            if value > getattr(self, limit) or value < 0:
                whole = ", the whole vocabulary," if value < 0 else ""
                raise LimitError(f"{name}={value}{whole} is above this service's limit of {getattr(self, limit)} ({limit})")
        for name, limit in _SIZES.items():
            value = getattr(params, name) or ()
            if len(value) > getattr(self, limit):
                raise LimitError(f"{name} has {len(value)} entries; this service's limit is {getattr(self, limit)} ({limit})")
        for name in ("stop", "bad_words"):
            for text in getattr(params, name):
                self._check_bytes(f"a text in {name}", text, "max_stop_bytes")

    def check_encoded(self, size: int) -> None:
        """Raise LimitError for encoded parameters of more bytes than these limits leave room for; reading them takes long."""
        room = _SCALARS + (self.max_listed + self.max_stop) * (self.max_stop_bytes + _HEADER) + _IDS * self.max_listed
        if size > room:
            raise LimitError(f"params have {size} bytes; within this service's limits they have at most {room}")

    def check_text(self, text: str) -> None:
        """Raise LimitError for a prompt that is too long."""
        self._check_bytes("the prompt", text, "max_text_bytes")

    def _check_bytes(self, what: str, text: str, limit: str) -> None:
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > getattr(self, limit):
            raise LimitError(f"{what} has {size} bytes; this service's limit is {getattr(self, limit)} ({limit})")

    def asdict(self) -> dict[str, Any]:
        """By name."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


def check_room(prompt: int, params: CommonParams, max_model_len: int) -> None:
    """Raise LimitError when a prompt of so many tokens leaves no room for max_tokens."""
    if params.max_tokens is not None and prompt + params.max_tokens > max_model_len:
        raise LimitError(
            f"max_tokens={params.max_tokens} after a prompt of {prompt} tokens are more than max_model_len={max_model_len}: "
            f"at most {max_model_len - prompt} fit, which max_tokens=None asks for"
        )


# Bytes of parameters in msgpack, at most: all that are no lists; what a text has beside its own; ids, one of each list.
_SCALARS, _HEADER, _IDS = 4096, 5, 36

_NUMBERS = {
    "n": "max_n",
    "best_of": "max_n",
    "beam_width": "max_beam_width",
    "num_simulations": "max_num_simulations",
    "max_depth": "max_tree_depth",
    "rollout_tokens": "max_rollout_tokens",
    "leaf_batch_size": "max_leaf_batch_size",
    "top_k": "max_candidates",
    "logprobs": "max_logprobs",
    "prompt_logprobs": "max_logprobs",
}
_SIZES = {
    "stop": "max_stop",
    "stop_token_ids": "max_listed",
    "bad_words": "max_listed",
    "allowed_token_ids": "max_listed",
    "logit_bias": "max_listed",
}

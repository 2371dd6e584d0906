"""Every field that a body may have, and what becomes of it: honoured, accepted as meaningless, or refused by name.

The fields of OpenAI's API and those that vLLM adds have the names that they have there. The rest of the honoured ones are
the fields of SamplingParams, and one object for each search with the fields of its parameters.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pagefork.scheduler.params import FOREIGN_NAMES, CommonParams, SamplingParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams

from .errors import ApiError

SEARCHES: dict[str, type[CommonParams]] = {
    "beam_search": BeamSearchParams,
    "contrastive_search": ContrastiveSearchParams,
    "mcts": MCTSParams,
}
_UNSENT = {"logits_processors", "rank_by", "trace"}  # functions, and what no answer has a place for


class Use(StrEnum):
    """What becomes of a field. A refused one may be null, or have the value that changes nothing."""

    HONOURED = "honoured"
    MEANINGLESS = "meaningless"
    REFUSED = "refused"


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """include_usage: one more event at the end, with the usage. include_obfuscation: only false."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _fields_of(cls: type[CommonParams]) -> dict[str, Any]:
    """Field name to type, as JSON can have them."""
    hints = get_type_hints(cls, include_extras=True)
    kinds = {name: hints[name] for name in cls.__struct_fields__ if name not in _UNSENT}
    return kinds | ({"value_fn": str | None} if "value_fn" in kinds else {})


def _search(name: str, cls: type[CommonParams]) -> Any:
    fields = [(field, kind | UnsetType, UNSET) for field, kind in _fields_of(cls).items()]
    title = "".join(word.capitalize() for word in name.split("_"))
    struct = msgspec.defstruct(title, fields, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True)
    return Annotated[struct, Meta(description=f"Search instead of sampling: the fields of {cls.__name__}")]


# Names that the parameters of requests have: what they are called here, they are called there.
PARAMETERS = {name: kind for name, kind in _fields_of(SamplingParams).items() if name != "logprobs"} | {
    "stop": Annotated[str | list[str], Meta(description="Texts that end an output; not part of it")],
}

_BOTH: dict[str, Any] = {
    "model": Annotated[str, Meta(description="One of /v1/models")],
    "stream": Annotated[bool, Meta(description="Answer by server-sent events")],
    "stream_options": StreamOptions,
    "priority": Annotated[
        int, Meta(ge=-(2**31), le=2**31 - 1, description="With the engine's policy `priority`: who has the lower one runs first")
    ],
    **{name: _search(name, cls) for name, cls in SEARCHES.items()},
}
_COMPLETION: dict[str, Any] = {
    "prompt": Annotated[str | list[str | int | list[int]], Meta(description="A text, token ids, or a list of either")],
    "logprobs": Annotated[int, Meta(ge=0, description="Top log-probs per token")],
    "echo": Annotated[bool, Meta(description="Begin with the prompt")],
    "max_tokens": Annotated[int, Meta(ge=0, description="Most tokens to generate; 0 takes echo, and scores the prompt")],
    "add_special_tokens": Annotated[bool, Meta(description="Tokenise texts with the special tokens of the checkpoint")],
}
_CHAT: dict[str, Any] = {
    "messages": Annotated[list[dict[str, Any]], Meta(min_length=1, description="Objects with role and content")],
    "logprobs": Annotated[bool, Meta(description="The log-prob of every token")],
    "top_logprobs": Annotated[int, Meta(ge=0, description="Top log-probs per token; takes logprobs")],
    "max_completion_tokens": Annotated[int, Meta(ge=1, description="As max_tokens")],
    "add_generation_prompt": Annotated[bool, Meta(description="End the text with the header of the model's turn")],
    "continue_final_message": Annotated[bool, Meta(description="End the text within the last message instead")],
    "chat_template_kwargs": Annotated[dict[str, Any], Meta(description="Further variables of the template")],
}

_MEANINGLESS_BOTH: dict[str, Any] = {"user": str}
_MEANINGLESS_CHAT: dict[str, Any] = {
    "metadata": dict[str, Any],
    "store": bool,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_options": dict[str, Any],
    "prompt_cache_retention": str,
    "parallel_tool_calls": bool,
}

# With the values that ask for nothing, besides null.
_REFUSED_COMPLETION: dict[str, list[Any]] = {"suffix": [""]}
_REFUSED_CHAT: dict[str, list[Any]] = {
    "audio": [],
    "chat_template": [],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "modalities": [["text"]],
    "moderation": [],
    "prediction": [],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "verbosity": ["medium"],
    "web_search_options": [],
}


class Route:
    """What the body of one route may have. `struct` is that body without the refused fields."""

    def __init__(
        self, name: str, required: str, own: dict[str, Any], meaningless: dict[str, Any], refused: dict[str, list[Any]]
    ) -> None:
        self.refused = refused
        kinds = {**_BOTH, **PARAMETERS, **own, **meaningless}
        self.uses = dict.fromkeys(kinds, Use.HONOURED) | dict.fromkeys(meaningless, Use.MEANINGLESS)
        self.uses |= dict.fromkeys(refused, Use.REFUSED)
        needed = ("model", required)
        fields = [(field, kinds[field]) for field in needed]
        optional = [(field, kind | None, None) for field, kind in kinds.items() if field not in needed]
        self.struct = msgspec.defstruct(
            name, [*fields, *optional], kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True
        )

    def read(self, body: dict[str, Any]) -> Any:
        """The body as `struct`. Raises ApiError (400) that names the first field that is not understood."""
        for name, value in body.items():
            if name not in self.uses:
                raise _unknown(name)
            if name in self.refused and value is not None and value not in self.refused[name]:
                allowed = " or ".join(msgspec.json.encode(choice).decode() for choice in [None, *self.refused[name]])
                raise ApiError(400, f"{name} is not supported; it may be {allowed}", param=name, code="unsupported_parameter")
        honoured = {name: value for name, value in body.items() if name not in self.refused}
        return convert(honoured, self.struct)


def convert(value: dict[str, Any], kind: Any) -> Any:
    """A JSON object as a Struct. Raises ApiError (400) that names the field."""
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at ")
        field = path.rpartition("$.")[2].strip("`").split("[")[0].split(".")[0] or None
        raise ApiError(400, f"{path.replace('`', '').replace('$.', '') or 'the body'}: {reason}", param=field) from None


def _unknown(name: str) -> ApiError:
    hint = FOREIGN_NAMES.get(name)
    return ApiError(
        400, f"there is no field {name!r:.80}" + (f"; {hint}" if hint else ""), param=name[:80], code="unknown_parameter"
    )


COMPLETION = Route("CompletionRequest", "prompt", _COMPLETION, _MEANINGLESS_BOTH, _REFUSED_COMPLETION)
CHAT = Route("ChatCompletionRequest", "messages", _CHAT, {**_MEANINGLESS_BOTH, **_MEANINGLESS_CHAT}, _REFUSED_CHAT)


def params_of(request: Any, defaults: dict[str, Any], changes: dict[str, Any]) -> CommonParams:
    """The parameters that a body asks for.

    defaults: what holds where the body says nothing. changes: what the route reads out of its own fields. Raises ApiError
    for two strategies, or a field given twice; ParameterError for one that the strategy does not have, or a bad value.
    """
    given = {name: value for name in PARAMETERS if (value := getattr(request, name)) is not None}
    given |= {name: value for name, value in changes.items() if value is not None}
    asked = {name: inner for name in SEARCHES if (inner := getattr(request, name)) is not None}
    if not asked:
        return SamplingParams(**defaults | given)
    if len(asked) > 1:
        raise ApiError(400, f"a request has one strategy, got {' and '.join(asked)}", param=next(iter(asked)))
    [(search, struct)] = asked.items()
    inner = {name: value for name in struct.__struct_fields__ if (value := getattr(struct, name)) is not UNSET}
    if twice := sorted(inner.keys() & given.keys()):
        raise ApiError(400, f"{twice[0]} is given twice, in {search} and beside it", param=twice[0])
    return SEARCHES[search](**defaults | given | inner)

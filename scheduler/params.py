"""What a request may ask for. Ranges are checked on construction and on decoding alike.

Names mean what they mean in vLLM, else in Hugging Face.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta

from .checking import Checked, fits_float32
from .errors import PageforkError, ParameterError

# What people type who come from another engine, and what becomes of it here.
FOREIGN_NAMES = {
    name: f"here it is called {ours}"
    for name, ours in {
        "max_new_tokens": "max_tokens",
        "max_length": "max_tokens",
        "min_new_tokens": "min_tokens",
        "num_return_sequences": "n",
        "do_sample": "temperature (0 is greedy)",
        "eos_token_id": "stop_token_ids",
        "stop_strings": "stop",
        "bad_words_ids": "bad_words",
        "typical_p": "top_p or min_p",
        "num_beams": "BeamSearchParams(beam_width=...)",
        "use_beam_search": "BeamSearchParams(beam_width=...)",
        "penalty_alpha": "ContrastiveSearchParams(alpha=...)",
    }.items()
} | {
    name: f"it belongs to {owner}"
    for owner, names in {
        "BeamSearchParams": ("beam_width", "length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty"),
        "ContrastiveSearchParams": ("alpha", "momentum", "window", "adaptive"),
        "MCTSParams": (
            *("num_simulations", "c_puct", "max_depth", "rollout_tokens", "leaf_batch_size", "selection", "fpu"),
            *("value_fn", "value_timeout", "reuse_tree", "visit_temperature"),
        ),
        "SamplingParams": ("best_of", "rank_by", "top_p", "min_p", "prompt_logprobs", "logprobs_mode"),
        "SamplingParams and MCTSParams": ("temperature", "seed"),
        "SamplingParams, ContrastiveSearchParams and MCTSParams": ("top_k",),
        "SamplingParams, BeamSearchParams and MCTSParams": ("n",),
    }.items()
    for name in names
}

# Called with the prompt's token ids, the output's token ids so far, and the logits, a float32 torch tensor [vocabulary];
# returns logits of that shape.
LogitsProcessor = Callable[[list[int], list[int], Any], Any]
Probability = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
StopString = Annotated[str, Meta(min_length=1)]
Seed = (
    Annotated[
        int,
        Meta(
            ge=0,
            le=2**63 - 1,
            description="Makes the draws reproducible; None: derived from the engine's seed and the request id",
        ),
    ]
    | None
)


class CommonParams(Checked, frozen=True, kw_only=True):
    """What every decoding strategy honours. Ranges stand in the annotations.

    logits_processors, in process only, are called one after another for every token of every sequence, after bans, bias
    and penalties and before the temperature: processor(prompt_token_ids, output_token_ids, logits) -> logits, with logits
    a float32 tensor [vocabulary] that may be changed in place. They see one sequence at a time and must depend on these
    arguments alone, since sequences fork. Each call costs a pass over the vocabulary and a Python call, for this request.

    Raises ParameterError (a ValueError) for an unknown name, a wrong type or a value out of range.
    """

    max_tokens: Annotated[int, Meta(ge=1, description="Most tokens to generate; None: up to max_model_len")] | None = 16
    min_tokens: Annotated[int, Meta(ge=0, description="End tokens are banned until this many are generated")] = 0
    stop: Annotated[list[StopString], Meta(description="Texts that end an output; not part of it")] = []
    stop_token_ids: Annotated[list[TokenId], Meta(description="Further tokens that end an output")] = []
    ignore_eos: Annotated[bool, Meta(description="Go on after the model's own end tokens")] = False
    include_stop_str_in_output: Annotated[bool, Meta(description="Keep the stop text in the output")] = False
    skip_special_tokens: Annotated[bool, Meta(description="Leave special tokens out of the text")] = True
    repetition_penalty: Annotated[
        float, Meta(gt=0, description="Logits of prompt and output tokens: divided if positive, else multiplied")
    ] = 1.0
    frequency_penalty: Annotated[Penalty, Meta(description="Subtracted once per occurrence in the output")] = 0.0
    presence_penalty: Annotated[Penalty, Meta(description="Subtracted from every token that occurs in the output")] = 0.0
    no_repeat_ngram_size: Annotated[int, Meta(ge=0, lt=2**31, description="No n-gram of this size occurs twice; 0: off")] = 0
    logit_bias: Annotated[dict[TokenId, float], Meta(description="Added to the logits of these token ids")] | None = None
    bad_words: Annotated[list[StopString], Meta(description="Texts whose token sequences are never completed")] = []
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, description="Every other token is banned")] | None = None
    logprobs: (
        Annotated[int, Meta(ge=-1, description="Top log-probs per token; 0: the chosen token's only; -1: the whole vocabulary")]
        | None
    ) = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    trace: Annotated[bool, Meta(description="Report how a search came to its outputs, and what they cost")] = False

    needs_hidden_states: ClassVar[bool] = False
    widened_by: ClassVar[str] = "its width"  # the parameters that decide how many sequences run at once
    error: ClassVar[type[PageforkError]] = ParameterError
    foreign: ClassVar[dict[str, str]] = FOREIGN_NAMES
    noun: ClassVar[str] = "parameter"

    def __post_init__(self) -> None:
        stop: Any = self.stop
        if isinstance(stop, str):
            msgspec.structs.force_setattr(self, "stop", [stop])
        self.check_fields()
        for name in self.__struct_fields__:  # what was checked stays as it is, whatever the caller does with his lists
            value = getattr(self, name)
            if isinstance(value, list | dict) and value:
                msgspec.structs.force_setattr(self, name, value.copy())
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(f"min_tokens={self.min_tokens} is larger than max_tokens={self.max_tokens}")
        for token, bias in (self.logit_bias or {}).items():
            if not math.isfinite(bias) or (bias and not fits_float32(bias)):
                raise ParameterError(
                    f"logit_bias[{token}]={bias} is not a finite 32-bit float; to ban a token use allowed_token_ids or bad_words"
                )

    @property
    def needs_text(self) -> bool:
        """Whether generated text matters while it is generated."""
        return bool(self.stop)

    def drawing(self) -> dict[str, Any]:
        """The fields of a Spec that say how draws come from logits; a `seed` of None is the engine's to choose."""
        return {}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return type(self)(**{**fields, **changes})


PRESETS: dict[str, dict[str, float]] = {
    "code": {"temperature": 0.2, "top_p": 0.95},
    "factual": {"temperature": 0.2, "top_p": 0.95},
    "chat": {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5},
    "creative": {"temperature": 1.2, "top_p": 0.95, "frequency_penalty": 0.5},
    "focused": {"temperature": 0.8, "top_p": 0.5},
}


class SamplingParams(CommonParams, frozen=True, kw_only=True, tag="sampling"):
    """Sampling, greedy decoding (temperature 0), several outputs (`n`) and best-of-n (`best_of`).

    Order of the logits pipeline: bans, logit_bias, penalties, logits_processors, temperature, top_k, top_p, min_p, draw.
    Raises ParameterError (a ValueError) for anything that can't be honoured.
    """

    widened_by: ClassVar[str] = "n or best_of"

    n: Annotated[int, Meta(ge=1, description="Outputs per prompt; they share the prompt's cache blocks")] = 1
    best_of: Annotated[int, Meta(ge=1, description="Generate this many, return the n best")] | None = None
    rank_by: Callable[[Any], float] | None = None
    temperature: Annotated[float, Meta(ge=0, description="0: greedy; below 1 sharper, above 1 flatter")] = 1.0
    top_k: Annotated[int, Meta(ge=-1, lt=2**31, description="Keep the k most probable tokens; 0 or -1: off")] = 0
    top_p: Annotated[Probability, Meta(description="Keep the smallest set of tokens with this mass")] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1, description="Keep tokens at least this fraction as probable as the best")] = 0.0
    seed: Seed = None
    prompt_logprobs: (
        Annotated[int, Meta(ge=-1, description="As logprobs, for the tokens of the prompt; they are not taken from the cache")]
        | None
    ) = None
    logprobs_mode: Annotated[Literal["raw", "processed"], Meta(description="Log-probs before or after the logits pipeline")] = (
        "raw"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of is not None and self.best_of < self.n:
            raise ParameterError(f"best_of={self.best_of} is smaller than n={self.n}")
        if self.greedy and self.width > 1:
            raise ParameterError(
                f"temperature=0 is greedy: all {self.width} outputs would be the same; use n=1, or a temperature above 0"
            )
        if self.rank_by is not None and self.best_of is None:
            raise ParameterError("rank_by ranks the candidates of best_of, which is not given")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken; below 1e-5 a temperature is 0."""
        return self.temperature < 1e-5

    @property
    def width(self) -> int:
        """Sequences that run at once."""
        return self.best_of or self.n

    @property
    def needs_text(self) -> bool:
        """rank_by sees the text."""
        return self.rank_by is not None or super().needs_text

    def drawing(self) -> dict[str, Any]:
        """The fields of a Spec that say how draws come from logits."""
        return {
            "temperature": 0.0 if self.greedy else self.temperature,
            "top_k": max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "processed": self.logprobs_mode == "processed",
            "seed": self.seed,
        }

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SamplingParams:
        """Settings for a purpose: code, factual, chat, creative or focused; `overrides` win."""
        if name not in PRESETS:
            raise ParameterError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

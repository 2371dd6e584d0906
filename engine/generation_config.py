"""What a model's generation_config.json means for requests that bring no parameters of their own."""

from __future__ import annotations

import logging
from typing import Any

from pagefork.scheduler.errors import ModelError, ParameterError
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams

logger = logging.getLogger("pagefork")

_ALWAYS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
# What each kind of decoding takes besides.
_SAMPLING = {name: name for name in ("temperature", "top_k", "top_p", "min_p")} | {"num_return_sequences": "n"}
_BEAM = {"num_beams": "beam_width", "num_return_sequences": "n"} | {
    name: name for name in ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
}
_CONTRASTIVE = {"penalty_alpha": "alpha", "top_k": "top_k"}
# What would change the output and has no counterpart, with the value at which it does nothing.
_UNHONOURED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "num_return_sequences": 1,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
    "min_length": 0,
    "max_time": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "encoder_no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "token_healing": False,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "watermarking_config": None,
}


def default_params(generation: dict[str, Any]) -> CommonParams:
    """Parameters that do what `generate()` of transformers does by default for a model with this generation_config.

    do_sample samples; what is not given is temperature 1, top_k 50 and top_p 1. Without it, num_beams above 1 is beam search,
    else penalty_alpha above 0 with top_k above 1 (50 if not given) is contrastive search, as in transformers 4, else
    decoding is greedy. Only how many tokens are generated differs: max_new_tokens if given, else the max_tokens of
    SamplingParams, or min_new_tokens where that is more; max_length, which counts the prompt, is not read. What can't be
    honoured is named in a warning.

    Raises ModelError for values that are refused.
    """
    given = {name: value for name, value in generation.items() if value is not None}
    kind, names = _kind(given)
    fields = {ours: given[theirs] for theirs, ours in (_ALWAYS | names).items() if theirs in given}
    if kind is SamplingParams and not names:
        fields["temperature"] = 0.0
    elif kind is not BeamSearchParams:
        fields.setdefault("top_k", 50)
    least, most = fields.get("min_tokens"), SamplingParams().max_tokens
    if isinstance(least, int) and most is not None:
        fields.setdefault("max_tokens", max(least, most))
    neutrals = {name: neutral for name, neutral in _UNHONOURED.items() if name not in names}
    unhonoured = [name for name, neutral in neutrals.items() if given.get(name, neutral) not in (neutral, [])]
    if unhonoured:
        logger.warning("generation_config.json has %s, which the default parameters leave out", ", ".join(unhonoured))
    try:
        return kind(**fields)
    except ParameterError as error:
        raise ModelError(f"generation_config.json gives no default parameters, pass some: {error}") from None


def _kind(given: dict[str, Any]) -> tuple[type[CommonParams], dict[str, str]]:
    """The parameters that a generation_config asks for, and which of its names they take besides those in _ALWAYS."""
    if given.get("do_sample"):
        return SamplingParams, _SAMPLING
    if given.get("num_beams", 1) != 1:
        return BeamSearchParams, _BEAM
    if given.get("penalty_alpha", 0) != 0 and given.get("top_k", 50) not in (0, 1):
        return ContrastiveSearchParams, _CONTRASTIVE
    return SamplingParams, {}

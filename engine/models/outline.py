"""Which code runs a checkpoint, decided by config.json alone, before any weights are read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pagefork.json_file import JsonObject
from pagefork.scheduler.errors import ModelError

from .config import FAMILIES, Outline, end_tokens, parse_config, read_configs, stated_dtype
from .rope import UnsupportedError

logger = logging.getLogger("pagefork")

_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "max_seq_length", "seq_length", "n_ctx",
)  # fmt: skip
_LONGEST = 2**24  # tokens that are served through transformers; the probe of windows takes memory for each of them
_REFUSED = {
    "FalconH1ForCausalLM": "its layers keep a state beside keys and values",
    "Gemma4UnifiedAssistantForCausalLM": "it drafts for another model, whose keys and values it reads",
    "Llama4ForCausalLM": "its attention scales queries by their place in the batch instead of their position",
}
_STATEFUL = ("linear", "mamba", "conv", "recurrent", "ssm", "rwkv", "lightning", "kda", "gla")


def read_outline(directory: Path, impl: str = "auto") -> Outline:
    """A DecoderConfig for a checkpoint that the native decoder runs, a plain Outline for one that transformers runs.

    impl: "native", "transformers", or "auto", which is native where that covers the checkpoint. Raises ModelError for
    what is missing, damaged or not supported.
    """
    config, generation = read_configs(directory)
    architecture = _architecture(config)
    if impl == "native" and architecture not in FAMILIES:
        raise ModelError(f"model_impl='native' covers {', '.join(FAMILIES)}, not {architecture}; use 'auto' or 'transformers'")
    if architecture in FAMILIES and impl != "transformers":
        try:
            return parse_config(config | {"architectures": [architecture]}, generation)
        except UnsupportedError as error:
            if impl == "native":
                raise
            logger.info("%s; the model runs through transformers", error)
    return _foreign(directory, architecture, config, generation)


def _architecture(config: JsonObject) -> str:
    """The name of the class to run. Raises ModelError for what no implementation covers."""
    listed = config.get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    given = ", ".join(names) or f"(none; model_type {config.get('model_type')!r})"
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(
            f"this checkpoint is quantized (quantization_config: {method}), which is not supported; use the original one"
        )
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{given} is an encoder-decoder, which is not supported; a decoder-only language model is")
    senses = sorted(key for key in config if key.endswith(("vision_config", "audio_config", "vision_tower")) and config[key])
    if senses or any(name.endswith("ForConditionalGeneration") for name in names):
        why = f" ({', '.join(senses)})" if senses else ""
        raise ModelError(f"{given} is multimodal{why}, which is not supported; a language model of text alone is")
    if len(names) == 1 and names[0] in FAMILIES:
        return names[0]
    served = causal_architectures()
    known = [name for name in names if name in served]
    if not known:
        remote = "; it asks for code of its own (auto_map), and remote code is never run" if config.get("auto_map") else ""
        raise ModelError(
            f"the architecture {given} is not supported{remote}; supported are the causal language models of transformers, "
            f"of which {', '.join(FAMILIES)} run natively"
        )
    if reason := _REFUSED.get(known[0]):
        raise ModelError(f"{known[0]} is not supported: {reason}")
    return known[0]


def causal_architectures() -> frozenset[str]:
    """The names of all causal language models that the installed transformers implements."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    names: set[str] = set()
    for value in NAMES.values():
        names.update([value] if isinstance(value, str) else value)
    return frozenset(names)


def _foreign(directory: Path, architecture: str, config: JsonObject, generation: JsonObject) -> Outline:
    from .pretrained import load_pretrained_config

    theirs = load_pretrained_config(directory, architecture)
    text = theirs.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    if stateful := sorted({str(kind) for kind in kinds if any(word in str(kind) for word in _STATEFUL)}):
        raise ModelError(
            f"{architecture} has layers of a kind that keeps a state instead of keys and values ({', '.join(stateful)}), "
            "which is not supported; attention is"
        )
    if getattr(text, "index_topk", None):
        raise ModelError(f"{architecture} attends to keys that an indexer selects (index_topk), which is not supported")
    return Outline(
        architecture=architecture,
        max_len=_longest(architecture, text),
        dtype=stated_dtype(config) or stated_dtype(config.get("text_config") or {}),
        eos_token_ids=end_tokens(config, config.get("text_config") or {}, generation),
    )


def _longest(architecture: str, config: Any) -> int:
    """How many positions a model serves without any key's depending on the length of the sequence."""
    found = [value for name in _LENGTHS if isinstance(value := getattr(config, name, None), int) and value > 0]
    if not found:
        raise ModelError(f"the configuration of this {architecture} states no longest sequence ({', '.join(_LENGTHS)})")
    longest = int(found[0])
    if longest >= 2**31:
        raise ModelError(
            f"the configuration of this {architecture} states sequences of {longest} tokens; at most 2**31 - 1 are supported"
        )
    try:
        return min(_stretched(longest, config), _LONGEST)
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"the rotary embedding of this {architecture} is refused: {error}") from None


def _stretched(longest: int, config: Any) -> int:
    """How many positions rotary embeddings make of those that a model states."""
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if rope.get("rope_type") == "longrope":
            # Beyond `original` all keys, those in the cache too, would be rotated by other frequencies.
            longest = min(longest, original or longest)
        elif rope.get("rope_type") == "yarn":
            longest = max(longest, int((original or longest) * (rope.get("factor") or 1)))
    return longest


def _ropes(config: Any) -> list[dict[str, Any]]:
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]

"""Rotary frequencies, as transformers derives them from rope_parameters.

A position's key is computed once and cached, so only scalings that fix the frequencies in advance can be served.
`dynamic` changes them when a sequence outgrows max_position_embeddings; ModelConfig.max_len stops there, and up to there
it equals `default`. `longrope` has one set for short and one for long sequences and is left to transformers.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from pagefork.scheduler.errors import ModelError

ROPE_TYPES = {  # and what each of them needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
Positive = Annotated[float, Meta(gt=0, lt=1e9)]


class UnsupportedError(ModelError):
    """The native decoder lacks a feature that a checkpoint of its architectures uses."""


class RopeConfig(Struct, frozen=True):
    """The base of the rotary frequencies and how they are scaled. Names are those of rope_parameters."""

    rope_type: str = "default"
    rope_theta: Annotated[float, Meta(gt=1, lt=1e30)] = 10000.0
    factor: Positive = 1.0
    original_max_position_embeddings: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class _Raw(Struct):
    """The part of config.json that is about rotary embeddings."""

    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    partial_rotary_factor: float | None = None


def parse_rope(config: dict[str, Any], positions: int) -> tuple[RopeConfig, int]:
    """The rotary embedding of the contents of config.json, and how many positions it serves.

    positions: max_position_embeddings. Raises UnsupportedError or, for a value that makes no sense, ModelError.
    """
    try:
        raw = msgspec.convert(config, _Raw)
    except msgspec.ValidationError as error:
        raise ModelError(f"the rotary embedding is refused: {error}") from None
    given = dict(raw.rope_parameters or raw.rope_scaling or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedError(f"rope_parameters that differ between kinds of layers ({', '.join(given)}) are not supported")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise UnsupportedError(f"rope_type={kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if (part := given.get("partial_rotary_factor", raw.partial_rotary_factor)) not in (None, 1.0):
        raise UnsupportedError(f"partial_rotary_factor={part} is not supported; heads rotate as a whole (1.0)")
    given = {name: value for name, value in given.items() if value is not None}
    if missing := [name for name in ROPE_TYPES[kind] if name not in given]:
        raise ModelError(f"rope_type={kind!r} needs {', '.join(missing)} in rope_parameters")
    original = raw.original_max_position_embeddings or given.get("original_max_position_embeddings") or positions
    given.setdefault("rope_theta", 10000.0 if raw.rope_theta is None else raw.rope_theta)
    given["original_max_position_embeddings"] = original
    try:
        rope = msgspec.convert(given | {"rope_type": kind}, RopeConfig)
    except msgspec.ValidationError as error:
        raise ModelError(f"rope_parameters are refused: {error}") from None
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ModelError(f"low_freq_factor={rope.low_freq_factor} must be below high_freq_factor={rope.high_freq_factor}")
    if kind != "yarn":  # beyond `positions` dynamic would change the frequencies of keys that are cached
        return rope, positions
    if "factor" not in given:
        rope = msgspec.structs.replace(rope, factor=positions / rope.original_max_position_embeddings)
    # yarn stretches `original` whether or not max_position_embeddings was raised along with it.
    longest = max(positions, int(rope.original_max_position_embeddings * rope.factor))
    if longest >= 2**31:
        raise ModelError(f"rope_parameters stretch sequences to {longest} tokens; at most 2**31 - 1 are supported")
    return rope, longest


def rotary(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """(inv_freq float32 [head_dim / 2], the factor on cos and sin)."""
    wide = rope.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / wide
    match rope.rope_type:
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3(plain, rope), 1.0
        case "yarn":
            return _yarn(wide, rope, head_dim), _yarn_scale(rope)
    return plain, 1.0


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended (Llama 3.1)."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)  # over the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = blend.clamp(0.0, 1.0)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(wide: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """The same idea with the blend linear in the dimension (Peng et al. 2023, NTK by parts)."""

    def dimension(turns: float) -> float:
        context = rope.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return stretched / (rope.factor * wide) + (1 - stretched) / wide


def _yarn_scale(rope: RopeConfig) -> float:
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)

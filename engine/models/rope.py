"""Rotary frequencies, as transformers derives them from rope_parameters.

A position's key is computed once and cached, so only scalings that fix the frequencies in advance can be served.
`dynamic` changes them when a sequence outgrows max_position_embeddings; ModelConfig.max_len stops there, and up to there
it equals `default`. `longrope`, which has one set for short and one for long sequences, is refused on loading.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import RopeConfig


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

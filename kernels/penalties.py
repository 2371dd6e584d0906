"""Repetition, frequency and presence penalties, from the token histories themselves: no count per vocabulary entry is kept.

repetition r, over prompt and output:   x = x / r if x > 0 else x * r        (Keskar et al. 2019, Hugging Face)
frequency f, presence q, over output:   x -= f * count + q * (count > 0)     (OpenAI, vLLM)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ._arguments import PerRow, Range, check_history, check_logits, fp32, per_row

_Change: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of (logits, row, token), all [N]


def apply_penalties(
    logits: Tensor,
    tokens: Tensor,
    length: Tensor,
    prompt_len: Tensor,
    repetition: PerRow = 1.0,
    frequency: PerRow = 0.0,
    presence: PerRow = 0.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """fp32 logits [B, V] with the penalties applied: a new tensor, or `out` (may be `logits`).

    tokens: integer [B, L], the history of each row; only its first length[b] (integer [B]) entries count, and
    those from prompt_len[b] (integer [B]) on are output. Penalties: numbers or [B]; 1, 0, 0 are off.
    Raises ValueError for a wrong shape, a repetition penalty <= 0 or a penalty that is not finite.
    """
    check_logits(logits)
    check_history(logits, tokens, length)
    repeat = per_row("repetition penalty", repetition, logits, torch.float32, Range(0, above=True))
    often = per_row("frequency penalty", frequency, logits, torch.float32, Range(-math.inf))
    present = per_row("presence penalty", presence, logits, torch.float32, Range(-math.inf))
    out = fp32(logits, out)
    column = torch.arange(tokens.shape[1], device=logits.device)
    known = column < length[:, None]
    generated = known & (column >= prompt_len[:, None])
    _penalize(out, tokens, known & (repeat != 1)[:, None], lambda x, row, _: torch.where(x > 0, x / repeat[row], x * repeat[row]))
    counted = generated & ((often != 0) | (present != 0))[:, None]
    if bool(counted.any()):
        count = torch.zeros_like(out).scatter_add_(-1, tokens.long().clamp(min=0), counted.float())
        _penalize(out, tokens, counted, lambda x, row, token: x - (often[row] * count[row, token] + present[row]))
    return out


def _penalize(logits: Tensor, tokens: Tensor, where: Tensor, change: _Change) -> None:
    """Changes, in place and once each, the logits of the tokens marked. All are read before any is written, so repeats agree."""
    row, column = where.nonzero(as_tuple=True)
    token = tokens[row, column].long()
    logits[row, token] = change(logits[row, token], row, token)

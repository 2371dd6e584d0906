"""No repeated n-grams: bans every token that would complete an n-gram which the history already holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import PerRow, Range, check_history, check_logits, fp32, per_row


def ban_repeated_ngrams(logits: Tensor, tokens: Tensor, length: Tensor, size: PerRow, *, out: Tensor | None = None) -> Tensor:
    """fp32 logits [B, V] with -inf for the tokens that would repeat an n-gram: a new tensor, or `out` (may be `logits`).

    tokens: integer [B, L], histories, of which the first length[b] (integer [B]) entries count.
    size: the n of each row, a number or [B]; 0 is off, 1 bans every token of the history.
    Raises ValueError for shapes that don't match or a negative size. Semantics of Hugging Face's no_repeat_ngram_size.
    """
    check_logits(logits)
    check_history(logits, tokens, length)
    n = per_row("n-gram size", size, logits, torch.int64, Range(0))
    n = torch.where(n > length, 0, n)  # longer than the history: nothing to repeat
    out = fp32(logits, out)
    width = tokens.shape[1]
    column = torch.arange(width, device=logits.device)
    # A column ends a repeat if the n - 1 tokens before it equal the last n - 1 tokens of the history.
    repeats = (column < length[:, None]) & (column >= n[:, None] - 1) & (n > 0)[:, None]
    for back in range(1, min(int(n.max()) if len(n) else 0, width)):
        suffix = tokens.gather(-1, (length[:, None] - back).clamp(min=0).long())
        repeats[:, back:] &= (tokens[:, :-back] == suffix) | (back >= n)[:, None]
    row, place = repeats.nonzero(as_tuple=True)
    out[row, tokens[row, place].long()] = -torch.inf
    return out

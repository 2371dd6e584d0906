"""Bans: tokens that may not be drawn get -inf. Single tokens, everything but a set, and the ends of token sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import check_history, check_logits, check_places, fp32


def ban_tokens(logits: Tensor, row: Tensor, token: Tensor, *, out: Tensor | None = None) -> Tensor:
    """fp32 logits [B, V] with -inf at every [row[i], token[i]]; row, token: integer [N].

    Here and below the result is a new tensor, or `out` (fp32 [B, V], may be `logits`), and ValueError is raised for
    shapes that don't match and ids out of range.
    """
    check_logits(logits)
    check_places(logits, row, token)
    out = fp32(logits, out)
    out[row, token] = -torch.inf
    return out


def allow_tokens(logits: Tensor, row: Tensor, token: Tensor, *, out: Tensor | None = None) -> Tensor:
    """fp32 logits [B, V]; every row that occurs in `row` keeps only the tokens listed for it, the others are -inf.

    row, token: integer [N], pairs of row and allowed token.
    """
    check_logits(logits)
    check_places(logits, row, token)
    out = fp32(logits, out)
    allowed = out[row, token]
    out[row.unique()] = -torch.inf
    out[row, token] = allowed
    return out


def ban_words(
    logits: Tensor, tokens: Tensor, length: Tensor, row: Tensor, token: Tensor, back: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """fp32 logits [B, V]; the last token of a token sequence is banned where the history ends with the others.

    tokens: integer [B, L], histories, of which the first length[b] (integer [B]) entries count.
    The words are given as integer vectors [N], word after word: first the last token of the word, with back = 0,
    then its other tokens with their distance from the end, back = 1, 2, ...; `row` says whom the word concerns.
    """
    check_logits(logits)
    check_history(logits, tokens, length)
    check_places(logits, row, token, back)
    if len(row) == 0:
        return fp32(logits, out)
    if int(back[0]) != 0:
        raise ValueError(f"a word begins with its last token, back = 0, not back = {int(back[0])}")
    column = length[row] - back
    if tokens.shape[1]:
        differs = (column < 0) | (tokens[row, column.clamp(0, tokens.shape[1] - 1)] != token)
    else:
        differs = torch.ones_like(row, dtype=torch.bool)
    last = back == 0
    word = last.cumsum(0) - 1
    mismatches = torch.zeros_like(word).index_add_(0, word, (differs & ~last).long())
    banned = last.nonzero()[:, 0][mismatches[: int(word[-1]) + 1] == 0]
    return ban_tokens(logits, row[banned], token[banned], out=out)

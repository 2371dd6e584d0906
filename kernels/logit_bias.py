"""Logit bias: a number added to the logits of single tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import check_logits, check_places, fp32


def apply_logit_bias(logits: Tensor, row: Tensor, token: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """fp32 logits [B, V] with bias[i] added at [row[i], token[i]]: a new tensor, or `out` (may be `logits`).

    row, token: integer [N], a pair at most once. bias: float [N]. A banned token (-inf) stays banned.
    Raises ValueError for shapes that don't match and ids out of range.
    """
    check_logits(logits)
    check_places(logits, row, token, bias)
    out = fp32(logits, out)
    out[row, token] += bias.to(torch.float32)
    return out

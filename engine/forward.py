"""What a forward has computed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .fused_draw import Drawn


class Forward(NamedTuple):
    """Of T tokens, padded to N."""

    tokens: Tensor  # int64 [N], with what slots drew last
    hidden: Tensor  # [N, hidden size]
    logits: Tensor | None = None  # [N, vocabulary] of all tokens, where a graph computed them
    drawn: Drawn | None = None  # what the SAMPLE of the step found, where a graph drew

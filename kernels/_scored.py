"""Scores of (row, token) pairs: what the kernels of a merge share.

score[r, t] = bias[r] + logprob[r, t];   logprob = fp32((x - top) + log_scale), by the scale of the row
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._order import NOTHING, ordered
from ._reading import table_parts
from ._triton import constant, jit, tl
from .adjusted import group_values
from .distribution import Scale
from .entries import ADJUSTED, FLAGS, ONLY, OWN, SLOT, entry_int
from .group_stats import GroupStats
from .scratch import GROUP
from .token_table import TokenTable

_GROUP = constant(GROUP)


class Rows(NamedTuple):
    """P entries whose pairs are scored. With `processed`, of their own distributions; else table applies to log-probs."""

    logits: Tensor
    entries: Tensor
    stats: GroupStats
    scale: Scale
    bias: Tensor  # fp32 [P]
    table: TokenTable | None
    processed: bool

    def arguments(self) -> tuple[Any, ...]:
        """What every kernel takes first: tensors, then numbers."""
        tensors = self.logits, self.entries, self.stats.top, self.scale.bad, self.scale.top, self.scale.log_scale, self.bias
        return *tensors, *table_parts(self.table, self.entries), self.logits.stride(0), self.logits.shape[1]

    def flags(self) -> dict[str, bool]:
        return {"ADJUST": self.table is not None, "OWNED": self.processed and self.stats.top.shape[0] == 2}


def argument_types(dtype: str) -> dict[str, str]:
    """Of `Rows.arguments`."""
    scale = {"bad": "i1", "best": "fp32", "log_scales": "fp64"}
    pointers = {"logits": dtype, "entries": "i32", "tops": "fp32", **scale, "bias": "fp32", "cells": "i32", "bits": "i64"}
    types = {name: f"*{kind}" for name, kind in pointers.items()}
    return {**types, "capacity": "i32", "stride": "i64", "vocab": "i32"}


@jit
def top_keys(
    tops: tl.tensor,
    index: tl.tensor,
    group: tl.tensor,
    groups: tl.tensor,
    entry: tl.tensor,
    bits: tl.tensor,
    scale: tl.tensor,
    ADJUST: tl.constexpr,
    OWNED: tl.constexpr,
) -> tl.tensor:
    """int32 keys [N] of the best scores of groups [N] of the entry with this index; NOTHING past the last group.

    The first axis of the grid is that of the entries. scale: bad, top, log_scale and bias of the entry. OWNED: entries that
    are OWN are scored by their own distribution.
    """
    bad, best, log_scale, bias = scale
    end = tl.where(bad, 0, groups)
    valid = group < end
    model = tops + index.to(tl.int64) * groups + group
    flags = entry_int(entry, FLAGS)
    if OWNED:
        model += tl.where((flags & OWN) != 0, tl.num_programs(0).to(tl.int64) * groups, 0)
    top = tl.load(model, mask=valid, other=-float("inf"))
    logprob = ((top - best).to(tl.float64) + log_scale).to(tl.float32)
    if ADJUST and not OWNED:
        adjusted = (flags & ADJUSTED) != 0
        slot = entry_int(entry, SLOT).to(tl.int64)
        touched = tl.load(bits + slot * groups + group, mask=group < tl.where(adjusted, end, 0), other=0) != 0
        own = tl.load(model + tl.num_programs(0).to(tl.int64) * groups, mask=touched, other=0.0)
        only = adjusted & ((flags & ONLY) != 0)
        logprob = tl.where(touched, own, tl.where(only, -float("inf"), logprob))
    return tl.where(valid, ordered(bias + logprob), NOTHING)


@jit
def scored_groups(
    row: tl.tensor,
    group: tl.tensor,
    valid: tl.tensor,
    vocab: tl.tensor,
    entry: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    scale: tl.tensor,
    ADJUST: tl.constexpr,
    OWNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Log-probs fp32 and int32 keys of the scores of groups [N] of one entry, [N, GROUP] both.

    Keys are NOTHING where not `valid` [N] and past the vocabulary.
    """
    _, best, log_scale, bias = scale
    if OWNED:
        x = group_values(row, group, valid, vocab, entry, cells, bits, capacity, best, log_scale, ADJUST, False)
        logprob = ((x - best).to(tl.float64) + log_scale).to(tl.float32)
    else:
        logprob = group_values(row, group, valid, vocab, entry, cells, bits, capacity, best, log_scale, ADJUST, True)
    token = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    return logprob, tl.where(valid[:, None] & (token < vocab), ordered(bias + logprob), NOTHING)


def empty_results(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for parent, token, score and logprob."""
    parent, token = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
    score, logprob = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return parent, token, score, logprob

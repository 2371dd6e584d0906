"""Rows read group by group: the largest value of every group says which groups a search can leave out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .scratch import GROUP, Scratch, wide_chunks


class Best(NamedTuple):
    values: Tensor  # [R, n], descending
    ids: Tensor  # int64 [R, n]


def grouped(values: Tensor) -> Tensor:
    """[B, W / GROUP, GROUP] of values [B, W]."""
    return values.view(len(values), -1, GROUP)


def group_sums(weight: Tensor, scratch: Scratch, values: Tensor | None = None, floor: Tensor | None = None) -> Tensor:
    """Sums in float64 [B, W / GROUP] of fp32 [B, W], or of the entries of it where values [B, W] >= floor [B].

    Uses the buffers "mask" and "exact".
    """
    sums = torch.empty(len(weight), weight.shape[1] // GROUP, dtype=torch.float64, device=weight.device)
    for cut in wide_chunks(weight):  # a sum of another type widens all its input first
        part = weight[cut]
        if values is not None and floor is not None:
            # 1.0 or 0.0: on a CPU a comparison that yields bools is several times slower
            part = torch.ge(values[cut], floor[cut, None], out=scratch.like("mask", part)).mul_(part)
        exact = scratch.like("exact", part, torch.float64).copy_(part)
        torch.sum(grouped(exact), -1, out=sums[cut])
    return sums


def gathered(values: Tensor, groups: Tensor, rows: Tensor | None = None) -> Tensor:
    """Some groups of some rows side by side, [R, n * GROUP]. values: [B, W]; groups: int64 [R, n]; rows: int64 [R], None: all."""
    if rows is None:
        rows = torch.arange(len(groups), device=groups.device)
    place = rows[:, None] * (values.shape[1] // GROUP) + groups
    return values.view(-1, GROUP).index_select(0, place.view(-1)).view(len(groups), -1)


def token_ids(groups: Tensor, place: Tensor) -> Tensor:
    """The ids of the tokens at columns `place` [R, m] of what `gathered` gave for `groups` [R, n]."""
    return groups.gather(-1, place // GROUP) * GROUP + place % GROUP


def find_best(values: Tensor, group_tops: Tensor, n: int, rows: Tensor | None = None) -> Best:
    """The n <= W largest values of each row, or of `rows`: they lie in the n groups of the largest maxima.

    Of ties with the last, any. values: fp32 [B, W], group_tops: fp32 [B, W / GROUP].
    """
    tops = group_tops if rows is None else group_tops[rows]
    groups = tops.topk(min(n, tops.shape[1]), sorted=False).indices
    best, place = gathered(values, groups, rows).topk(n)
    return Best(best, token_ids(groups, place))

"""The largest value t of a row such that the entries >= t weigh enough: top-k (every entry weighs 1) and top-p.

Sort-free. A histogram over BUCKETS equal ranges of value gives the range that holds t; its few members are
gathered and searched again, until they are few enough to sort. Weights are integers held in floats and their sums
stay below 2^53, so every sum is exact in float64: the result depends neither on the order of summation nor on the
number of rounds, and no neighbour can change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scratch import GROUP, Scratch, wide_chunks

BUCKETS = 4096
FEW = 2048  # columns that are sorted rather than searched
ROUNDS = 4  # searches before sorting anyway: ranges of extreme ratio may resist
_LOWEST = torch.finfo(torch.float32).min


def heavy_threshold(
    values: Tensor,
    weight: Tensor | None,
    target: Tensor,
    high: Tensor,
    reach: Tensor | float,
    scratch: Scratch,
    *,
    share: bool = False,
    rounds: int = ROUNDS,
) -> Tensor:
    """The largest t of each row with sum(weight[values >= t]) >= target, or, `share`, >= target * sum(weight).

    values: fp32 [R, N] without NaN, N a multiple of GROUP. weight: fp32 [R, N] of integers (None: ones).
    target: float64 [R], in (0, sum of weights], or in (0, 1]. high: fp32 [R], the largest values, finite.
    reach: how far below them t is expected (fp32 [R] or one number); further away it is found more slowly.
    Returns fp32 [R]. Uses the buffers "mask", "bucket", "buckets", "place" and "exact".
    """
    if values.shape[1] <= FEW or rounds == 0:
        return _by_sorting(values, weight, target, share)
    low = values.amin(-1)
    span = (high - low).clamp_(max=reach).clamp_(1e-30, -_LOWEST)
    bucket, mass = _histogram(values, weight, high, BUCKETS / span, scratch)
    mass = mass.cumsum(-1, dtype=torch.float64)
    target = target * mass[:, -1] if share else target
    chosen = torch.searchsorted(mass, target[:, None]).clamp_(max=BUCKETS - 1)
    above = torch.where(chosen > 0, mass.gather(-1, (chosen - 1).clamp_(min=0)), 0.0)
    constant = (high == low)[:, None]  # nothing to search for: match no bucket
    bucket.eq_(torch.where(constant, -1, chosen).to(bucket.dtype))
    members, member_weight = _gather_members(values, weight, high, bucket)
    if members.shape[1] == 0:
        return high
    found = heavy_threshold(members, member_weight, target - above[:, 0], members.amax(-1), torch.inf, scratch, rounds=rounds - 1)
    return torch.where(constant[:, 0], high, found)


def _histogram(values: Tensor, weight: Tensor | None, high: Tensor, scale: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The bucket of every entry, int16 [R, N], and what is in every bucket [R, BUCKETS]: mass, float64, or count, fp32.

    values: fp32 [R, N]; high, scale: fp32 [R]. Uses the buffers "mask", "bucket", "buckets", "place" and "exact".
    """
    bucket = scratch.like("bucket", values, torch.int16)
    exact = torch.float32 if weight is None else torch.float64
    mass = scratch.take("buckets", (len(values), BUCKETS), exact, values.device).zero_()
    ones = values.new_ones(1, values.shape[1])
    for cut in wide_chunks(values):
        depth = torch.sub(high[cut, None], values[cut], out=scratch.like("mask", values[cut])).mul_(scale[cut, None])
        bucket[cut] = depth.clamp_(max=BUCKETS - 1)
        place = scratch.like("place", depth, torch.int64).copy_(bucket[cut])  # by way of 16 bits in half the time
        source = ones.expand_as(depth) if weight is None else scratch.like("exact", depth, exact).copy_(weight[cut])
        mass[cut].scatter_add_(-1, place, source)  # a bincount is as fast, but on one thread
    return bucket, mass


def _gather_members(values: Tensor, weight: Tensor | None, default: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Entries where `chosen` [R, N] is not 0, packed to the left [R, M]. Padding: one of the row's own, weightless."""
    groups = chosen.view(len(values), -1, GROUP)
    row, group = groups.amax(-1).nonzero(as_tuple=True)  # few groups have members: several times faster than all columns
    which, lane = groups[row, group].nonzero(as_tuple=True)
    row, column = row[which], group[which] * GROUP + lane
    count = torch.bincount(row, minlength=len(values))
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    member = values[row, column].clamp_(min=_LOWEST)
    padding = default.clone()
    padding[row] = member
    members = padding[:, None].repeat(1, -(-int(count.max()) // GROUP) * GROUP)
    members[row, place] = member
    member_weight = torch.zeros_like(members)
    member_weight[row, place] = 1.0 if weight is None else weight[row, column]
    return members, member_weight


def _by_sorting(values: Tensor, weight: Tensor | None, target: Tensor, share: bool) -> Tensor:
    values, order = values.sort(-1, descending=True)
    mass = (torch.ones_like(values) if weight is None else weight.gather(-1, order)).double().cumsum_(-1)
    target = target * mass[:, -1] if share else target
    chosen = torch.searchsorted(mass, target[:, None]).clamp_(max=values.shape[1] - 1)
    return values.gather(-1, chosen)[:, 0]

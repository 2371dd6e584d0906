"""Draws one token per row: temperature, top-k, top-p, min-p, then the inverse CDF in token-id order.

The draw is a pure function of the row's logits and parameters and of (seed, stream, position): one Philox call per
row, no noise per vocabulary entry. Neither other rows, their number nor their order can change it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import PerRow, per_row
from .distribution import Distribution
from .filters import GREEDY, check_min_p, check_temperature, check_top_k, check_top_p
from .philox import uniform
from .scratch import Scratch, chunks, widened


class Sample(NamedTuple):
    token: Tensor  # int64 [B]; 0 where bad
    logprob: Tensor  # fp32 [B], of the distribution that was drawn from
    bad: Tensor  # bool [B]: the row has NaN or +inf, or is nothing but -inf


def sample(
    logits: Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    seed: PerRow = 0,
    stream: PerRow = 0,
    position: PerRow = 0,
) -> Sample:
    """One token per row of logits [B, V]; parameters are numbers or tensors [B].

    A temperature below 1e-5 is greedy: the argmax, lowest id first, with the log-prob it has at temperature 1.
    seed, stream: 64 bits; position: 32 bits. Raises ValueError for a value out of range or of a wrong shape.
    """
    heat = check_temperature(logits, temperature)
    greedy = heat < GREEDY
    heat = torch.where(greedy, 1.0, heat)
    limits = check_top_k(logits, top_k), check_top_p(logits, top_p), check_min_p(logits, min_p)
    keys = (("seed", seed), ("stream", stream), ("position", position))
    numbers = uniform(*(per_row(name, value, logits, torch.int64) for name, value in keys))
    token = torch.empty_like(greedy, dtype=torch.int64)
    logprob, bad = torch.empty_like(heat), torch.empty_like(greedy)
    scratch = Scratch()
    for part in chunks(len(logits), logits.shape[1], logits.device):
        dist = Distribution(widened(logits[part], scratch), None if bool((heat[part] == 1).all()) else heat[part], scratch)
        dist.restrict(*(limit[part] for limit in limits))
        token[part] = choose(dist, greedy[part], numbers[part])
        logprob[part] = dist.scale().log_probs(dist.values.gather(-1, token[part, None]))[:, 0]
        bad[part] = dist.bad
    return Sample(token, logprob, bad)


def choose(dist: Distribution, greedy: Tensor, numbers: Tensor) -> Tensor:
    """int64 [B]: the best token where `greedy` (bool [B]), else the draw of `numbers` (float64 [B] in [0, 1)); 0 in bad rows."""
    if bool(greedy.all()):
        return dist.best()
    drawn = dist.draw(numbers)
    return torch.where(greedy, dist.best(), drawn) if bool(greedy.any()) else drawn

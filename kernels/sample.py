"""Draws one token per row: temperature, top-k, top-p, min-p, then the inverse CDF in token-id order.

The draw is a pure function of the row's logits and parameters and of (seed, stream, position): one Philox call per
row, no noise per vocabulary entry. Neither other rows, their number nor their order can change it.
On a GPU the rows become entries of `group_stats` and `draw`, and nothing waits for the device; on a CPU the native library
reads them, where it is there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import native_sampling as native
from ._arguments import PerRow, per_row
from ._triton import fused
from .distribution import Distribution
from .draw import draw
from .entries import ENTRY, Entry
from .filters import GREEDY, check_min_p, check_temperature, check_top_k, check_top_p
from .group_stats import group_stats
from .philox import uniform
from .scratch import chunks, thread_scratch, widened


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
    names = (("seed", seed), ("stream", stream), ("position", position))
    keys = [per_row(name, value, logits, torch.int64) for name, value in names]
    if fused(logits):
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        entries = _entries(greedy, heat, limits, keys)
        own = isinstance(temperature, Tensor) or GREEDY <= temperature != 1
        filtered = any(isinstance(value, Tensor) or value != off for value, off in ((top_k, 0), (top_p, 1), (min_p, 0)))
        found = draw(logits, entries, group_stats(logits, entries, own), None, filtered=filtered)
        return Sample(found.token, found.logprob, found.bad)
    if native.takes(logits):
        return _native(logits, greedy, heat, limits, keys)
    numbers = uniform(*keys)
    token = torch.empty_like(greedy, dtype=torch.int64)
    logprob, bad = torch.empty_like(heat), torch.empty_like(greedy)
    scratch = thread_scratch(logits.device)
    for part in chunks(len(logits), logits.shape[1], logits.device):
        dist = Distribution(widened(logits[part], scratch), None if bool((heat[part] == 1).all()) else heat[part], scratch)
        dist.restrict(*(limit[part] for limit in limits))
        token[part] = choose(dist, greedy[part], numbers[part])
        logprob[part] = dist.scale().log_probs(dist.values.gather(-1, token[part, None]))[:, 0]
        bad[part] = dist.bad
    return Sample(token, logprob, bad)


def _native(logits: Tensor, greedy: Tensor, heat: Tensor, limits: tuple[Tensor, Tensor, Tensor], keys: list[Tensor]) -> Sample:
    given = native.entries(logits, np.arange(len(logits)))
    values = {"temperature": heat, "flags": greedy * int(native.GREEDY) + int(native.SHAPED | native.PROCESSED)}
    values |= zip(("top_k", "top_p", "min_p", "seed", "stream", "position"), (*limits, *keys), strict=True)
    for name, value in values.items():
        given[name] = value.numpy()
    found, _ = native.read(logits, given, thread_scratch(logits.device))
    return Sample(found.token.long(), found.logp, found.bad)


def _entries(greedy: Tensor, heat: Tensor, limits: tuple[Tensor, Tensor, Tensor], keys: list[Tensor]) -> Tensor:
    """The rows as entries, int32 [B, WORDS] of `ENTRY`. heat: 1 where greedy."""
    top_k, top_p, min_p = limits
    given = {
        "row": torch.arange(len(heat), dtype=torch.int32, device=heat.device),
        "flags": (greedy * int(Entry.GREEDY) + (heat != 1) * int(Entry.OWN) + int(Entry.PROCESSED)).int(),
        "temperature": heat,
        "top_k": top_k.clamp(max=2**31 - 1).int(),
        "top_p": top_p,
        "min_p_depth": heat.double() * min_p.log(),
        "seed": keys[0],
        "stream": keys[1],
        "position": keys[2].int(),
    }
    unused = torch.zeros_like(given["row"])
    assert ENTRY.names is not None
    return torch.cat([given.get(name, unused).contiguous()[:, None].view(torch.int32) for name in ENTRY.names], 1)


def choose(dist: Distribution, greedy: Tensor, numbers: Tensor) -> Tensor:
    """int64 [B]: the best token where `greedy` (bool [B]), else the draw of `numbers` (float64 [B] in [0, 1)); 0 in bad rows."""
    if bool(greedy.all()):
        return dist.best()
    drawn = dist.draw(numbers)
    return torch.where(greedy, dist.best(), drawn) if bool(greedy.any()) else drawn

"""What turns values into log-probs, from the records of `group_stats` alone.

    W[g]  = round(2^40 exp((top[g] - max top) / temperature) mass[g] / 2^23)
    log p = (x - max top) / temperature - log(sum W / 2^40)

Weights are integers, so that their sum is the same bits whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import Variant, constant, jit, launch, need_kernels, power_of_two, tl
from .distribution import Scale
from .entries import ENTRY_WORDS, FLAGS, OWN, TEMPERATURE, entry_float, entry_int
from .group_stats import UNIT, GroupStats, fall_rate
from .scratch import GROUP

_UNIT = 2.0**40  # the weight of the largest value
_MASS_UNIT = constant(_UNIT / UNIT)
_WEIGHT_UNIT = constant(_UNIT)
_GROUP = constant(GROUP)


class ScaleBuffers(NamedTuple):
    """Where kernels write N kinds of scales for P entries."""

    floats: Tensor  # fp32 [N, 3, P]: top, temperature, floor
    log_scale: Tensor  # float64 [N, P]
    bad: Tensor  # bool [N, P]

    @classmethod
    def empty(cls, kinds: int, count: int, device: torch.device) -> ScaleBuffers:
        return cls(
            torch.empty((kinds, 3, count), dtype=torch.float32, device=device),
            torch.empty((kinds, count), dtype=torch.float64, device=device),
            torch.empty((kinds, count), dtype=torch.bool, device=device),
        )

    def scale(self, kind: int) -> Scale:
        top, temperature, floor = self.floats[kind].unbind()
        return Scale(self.bad[kind], top, temperature, self.log_scale[kind], floor)


@jit
def value_weight(x: tl.tensor, best: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """int64 weights of values, 2^40 for `best`, the largest (finite)."""
    return (tl.exp2((x - best) * rate) * _WEIGHT_UNIT + 0.5).to(tl.int64)


@jit
def group_weights(tops: tl.tensor, masses: tl.tensor, best: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """int64 weights of groups from their records, where `best`, the largest top, is finite."""
    share = tl.exp2((tops - best) * fall_rate(temperature)).to(tl.float64) * masses.to(tl.float64)
    return (share * _MASS_UNIT + 0.5).to(tl.int64)


@jit
def weigh(
    top: tl.tensor, mass: tl.tensor, groups: tl.tensor, temperature: tl.tensor, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of an entry's records at pointers: whether they are bad, the largest top (0 if bad), and of every GROUP groups, for
    at most ROWS times as many, the largest top [ROWS] and the weight, int64 [ROWS] (0 if bad).
    """
    group = tl.arange(0, ROWS)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    tops = tl.load(top + group, mask=group < groups, other=-float("inf"))
    masses = tl.load(mass + group, mask=group < groups, other=0)
    row_tops = tl.max(tops, 1)
    best = tl.max(row_tops, 0)
    bad = tl.abs(best) == float("inf")
    best = tl.where(bad, 0.0, best)
    weights = tl.sum(group_weights(tops, masses, best, temperature), 1)
    return bad, best, row_tops, tl.where(bad, 0, weights)


@jit
def log_scale_of(mass: tl.tensor) -> tl.tensor:
    """float64: the log-prob of the largest value. mass: int64, the sum of all weights (0 counts as 1 unit)."""
    return -tl.log(tl.maximum(mass, 1).to(tl.float64) / _WEIGHT_UNIT)


@jit
def store_scale(
    floats: tl.tensor,
    log_scales: tl.tensor,
    bads: tl.tensor,
    kind: tl.constexpr,
    bad: tl.tensor,
    top: tl.tensor,
    temperature: tl.tensor,
    log_scale: tl.tensor,
    floor: tl.tensor,
) -> None:
    """Into `ScaleBuffers`, for the entry of this program."""
    entry, count = tl.program_id(0), tl.num_programs(0)
    tl.store(floats + 3 * kind * count + entry, top)
    tl.store(floats + (3 * kind + 1) * count + entry, temperature)
    tl.store(floats + (3 * kind + 2) * count + entry, floor)
    tl.store(log_scales + kind * count + entry, log_scale)
    tl.store(bads + kind * count + entry, bad)


def model_scale(stats: GroupStats) -> Scale:
    """Of the model's distributions, [P] each."""
    return _scale(stats, None)


def own_scale(stats: GroupStats, entries: Tensor) -> Scale:
    """Of the entries' own distributions, at their temperature and without limits; the model's where an entry is not OWN."""
    return _scale(stats, entries)


def _scale(stats: GroupStats, entries: Tensor | None) -> Scale:
    kinds, count, groups = stats.top.shape
    need_kernels(stats.top)
    out = ScaleBuffers.empty(1, count, stats.top.device)
    own = entries is not None
    block = power_of_two(groups, GROUP)
    launch(
        _kernel,
        (count,),
        stats.top,
        stats.mass,
        stats.mass if entries is None else entries,
        *out,
        groups,
        warps=_warps(block),
        HAS_OWN=own and kinds == 2,
        OWN_HEAT=own,
        BLOCK=block,
    )
    return out.scale(0)


def _warps(block: int) -> int:
    return 8 if block >= 2048 else 4


@jit
def _kernel(
    top: tl.tensor,
    mass: tl.tensor,
    entries: tl.tensor,
    floats: tl.tensor,
    log_scales: tl.tensor,
    bads: tl.tensor,
    groups: tl.tensor,
    HAS_OWN: tl.constexpr,
    OWN_HEAT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    entry = entries + tl.program_id(0) * ENTRY_WORDS
    first = tl.program_id(0).to(tl.int64) * groups
    if HAS_OWN:
        own = (entry_int(entry, FLAGS) & OWN) != 0
        first += tl.where(own, tl.num_programs(0).to(tl.int64) * groups, 0)
    temperature = tl.full([], 1.0, tl.float32)
    if OWN_HEAT:
        temperature = entry_float(entry, TEMPERATURE)
    bad, best, _, weights = weigh(top + first, mass + first, groups, temperature, BLOCK // _GROUP)
    log_scale = log_scale_of(tl.sum(weights, 0))
    store_scale(floats, log_scales, bads, 0, bad, best, temperature, log_scale, -float("inf"))


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    types = {
        "top": "*fp32",
        "mass": "*i32",
        "entries": "*i32",
        "floats": "*fp32",
        "log_scales": "*fp64",
        "bads": "*i1",
        "groups": "i32",
    }
    for block in (512, 1024, 2048, 4096):
        for own in (False, True):
            yield Variant(_kernel, types, {"HAS_OWN": own, "OWN_HEAT": own, "BLOCK": block}, _warps(block))

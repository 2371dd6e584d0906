"""One softmax per row, filtered by value and drawn from by inverse CDF.

Probabilities are held as integers in units of 2^-52, in fp32 (a rounded fp32 loses nothing of that size that it had).
Sums of them are exact in float64 whatever the order, so a row's mass, filters and draw are the same bits in every batch.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import Best, find_best, gathered, group_sums, grouped
from .scratch import GROUP, Scratch, wide_chunks
from .threshold import heavy_threshold

SPARSE = 3  # groups that matter are gathered where the row has at least so many times as many
HEAD = 128  # filters that end among this many best tokens are found by a partial sort
SPREAD = 2.0  # the best tokens may share groups: how far the estimate of their mass may fall short
REACH = 40.0  # exp(-40) is below the unit of probability
_UNIT = 2.0**52


class Scale(NamedTuple):
    """What turns values into log-probs, [B] each: log p = (value - top) / temperature + log_scale if value >= floor."""

    bad: Tensor  # bool; NaN, +inf or only -inf: the row's other numbers mean nothing
    top: Tensor  # fp32, the largest value
    temperature: Tensor  # fp32
    log_scale: Tensor  # float64, log-prob of the largest value
    floor: Tensor  # fp32; smaller values are filtered out

    def pick(self, rows: Tensor | slice) -> Scale:
        return Scale(*(field[rows] for field in self))

    def log_probs(self, values: Tensor) -> Tensor:
        """fp32 [B, n] for values fp32 [B, n]; -inf for what is filtered out."""
        depth = (values - self.top[:, None]).div_(self.temperature[:, None])
        logp = (depth.double() + self.log_scale[:, None]).float()
        return logp.masked_fill_(values < self.floor[:, None], -torch.inf)


class _Kept(NamedTuple):
    """The tokens that are left: those of some groups with values >= floor."""

    groups: Tensor | None  # int64 [R, n], the groups that are not empty and perhaps others, ascending; None: all groups
    weight: Tensor  # fp32 [R, n * GROUP], of those
    values: Tensor  # fp32 [R, n * GROUP]
    floor: Tensor | None  # fp32 [R]; None: all are left

    def sums(self, scratch: Scratch) -> Tensor:
        """The mass that every group keeps, float64 [R, n]."""
        return group_sums(self.weight, scratch, self.values, self.floor)

    def inside(self, place: Tensor) -> Tensor:
        """The weights that are left of the group at `place`, int64 [R, 1]: float64 [R, GROUP]."""
        weight = gathered(self.weight, place).double()
        return weight if self.floor is None else weight.masked_fill_(gathered(self.values, place) < self.floor[:, None], 0)


class Distribution:
    """softmax(values / temperature) of each row; `restrict` takes tokens out of it, `draw` draws a token.

    values: fp32 [B, W] from `widened`, not modified. temperature: fp32 [B], > 0 (None: 1).
    Works in `scratch`: of the distributions that share one, only the newest may be used (a Scale stays good).
    """

    def __init__(self, values: Tensor, temperature: Tensor | None, scratch: Scratch) -> None:
        self.group_tops = grouped(values).amax(-1)
        top = self.group_tops.amax(-1)
        self.bad = ~torch.isfinite(top)
        if bool(self.bad.any()):  # a harmless row in its place
            for tensor in (self.group_tops, values := values.clone()):
                tensor.masked_fill_(self.bad[:, None], -torch.inf)
                tensor[:, 0].masked_fill_(self.bad, 0.0)
            top = top.masked_fill(self.bad, 0.0)
        self.values, self.top, self.temperature, self.scratch = values, top, temperature, scratch
        self.floor: Tensor | None = None

    @cached_property
    def weight(self) -> Tensor:
        """Probability before `restrict` in units of 2^-52, fp32 [B, W]."""
        weight = self.scratch.like("weight", self.values)
        for cut in wide_chunks(self.values):
            depth = self.values[cut]
            if self.temperature is not None:  # relative to the largest: division by a small temperature can't overflow
                depth = torch.sub(depth, self.top[cut, None], out=self.scratch.like("mask", depth))
                depth.div_(self.temperature[cut, None])
            torch.softmax(depth, -1, out=weight[cut]).mul_(_UNIT).round_()
        return weight

    @cached_property
    def peak(self) -> Tensor:
        """The largest weight, float64 [B]."""
        return self.weight.gather(-1, self.best()[:, None])[:, 0].double()

    @cached_property
    def kept(self) -> _Kept:
        """What can be drawn."""
        return _Kept(None, self.weight, self.values, None)

    @cached_property
    def group_mass(self) -> Tensor:
        """The mass of every group of `kept`, float64 [B, n]."""
        return self.kept.sums(self.scratch)

    @cached_property
    def cumulative(self) -> Tensor:
        """The mass up to the end of every group of `kept`, float64 [B, n]."""
        return self.group_mass.cumsum(-1)

    @property
    def mass(self) -> Tensor:
        """The sum of the weights that are kept, float64 [B]."""
        return self.cumulative[:, -1]

    def scale(self) -> Scale:
        """What log-probs need, of the distribution as restricted so far."""
        temperature = torch.ones_like(self.top) if self.temperature is None else self.temperature
        floor = torch.full_like(self.top, -torch.inf) if self.floor is None else self.floor
        return Scale(self.bad, self.top, temperature, (self.peak / self.mass).log_(), floor)

    def restrict(self, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
        """Takes out what `find_floor` says. Once only."""
        self.floor = self.find_floor(top_k, top_p, min_p)
        if self.floor is not None:
            self.kept = self._at_least(self.floor)
            for known in ("group_mass", "cumulative"):
                self.__dict__.pop(known, None)

    def find_floor(self, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor | None:
        """The smallest value that passes top-k, then top-p of the remaining mass, then min-p; None where all are off.

        A threshold on the value, so every tie of it stays. top_k: int64 [B], < 1 or >= W is off.
        top_p: float64 [B] in (0, 1], 1 is off. min_p: float64 [B] in [0, 1], 0 is off. Returns fp32 [B].
        """
        limited = (top_k > 0) & (top_k < self.values.shape[1])
        nucleus = top_p < 1.0
        floors = []
        if bool((min_p > 0).any()):
            floors.append(self._min_p_floor(min_p))
        if bool((limited | nucleus).any()):
            floors += self._rank_floors(torch.where(limited, top_k, 0), top_p)
        return torch.stack(floors).amax(0) if floors else None

    def best(self) -> Tensor:
        """The most probable token, the lowest id of ties, int64 [B]."""
        group = self.group_tops.argmax(-1)  # an argmax over all tokens is not vectorised on a CPU
        return group * GROUP + gathered(self.values, group[:, None]).argmax(-1)

    def draw(self, uniform: Tensor) -> Tensor:
        """The first token id whose cumulative mass, in id order, exceeds uniform * mass. uniform: float64 [B] in [0, 1)."""
        mass = self.mass[:, None]
        aim = torch.minimum((uniform[:, None] * mass).floor_(), mass - 1)
        group = torch.searchsorted(self.cumulative, aim, right=True)
        before = torch.where(group > 0, self.cumulative.gather(-1, (group - 1).clamp_(min=0)), 0.0)
        inside = self.kept.inside(group).cumsum_(-1)
        lane = torch.searchsorted(inside, aim - before, right=True)
        if self.kept.groups is not None:
            group = self.kept.groups.gather(-1, group)
        return (group * GROUP + lane)[:, 0]

    def _min_p_floor(self, min_p: Tensor) -> Tensor:
        """p >= min_p * max p, as a threshold on the value: the smallest fp32 not below top + T log(min_p)."""
        temperature = 1.0 if self.temperature is None else self.temperature.double()
        exact = self.top.double() + temperature * min_p.log()
        floor = exact.float()
        return torch.where(floor.double() < exact, floor.nextafter(torch.full_like(floor, torch.inf)), floor)

    def _rank_floors(self, top_k: Tensor, top_p: Tensor) -> list[Tensor]:
        """Thresholds of top-k (0 is off) and of top-p, each [B] with -inf where off."""
        limited, nucleus = top_k > 0, top_p < 1.0
        short = limited & (top_k <= HEAD)
        compact = nucleus & ~limited
        if bool(compact.any()):
            compact &= top_p <= SPREAD * self._head_share()
        rows, best = self._head(short, compact, top_k)
        k_floor = torch.full_like(self.top, -torch.inf)
        if bool(short.any()):
            last = (top_k[rows] - 1).clamp_(0, best.values.shape[1] - 1)[:, None]
            k_floor[rows] = torch.where(short[rows], best.values.gather(-1, last)[:, 0], -torch.inf)
        deep = limited & ~short
        if bool(deep.any()):
            values = self.scratch.rows("picked", self.values, deep)
            k_floor[deep] = heavy_threshold(values, None, top_k[deep].double(), self.top[deep], torch.inf, self.scratch)
        if not bool(nucleus.any()):
            return [k_floor]
        crossed = limited & nucleus
        share = not (len(rows) or bool(crossed.any()))  # the search adds up all weights anyway
        target = top_p if share else top_p * self._mass_above(k_floor, crossed)
        p_floor = torch.full_like(self.top, -torch.inf)
        if len(rows):
            mass = self.weight[rows[:, None], best.ids].double().cumsum_(-1)
            place = torch.searchsorted(mass, target[rows][:, None])
            reached = (place < mass.shape[1])[:, 0] & nucleus[rows]
            p_floor[rows[reached]] = best.values[reached].gather(-1, place[reached])[:, 0]
        rest = nucleus & (p_floor == -torch.inf)
        if bool(rest.any()):
            values, weight = self.scratch.rows("picked", self.values, rest), self.scratch.rows("picked weight", self.weight, rest)
            reach = REACH if self.temperature is None else REACH * self.temperature[rest]
            p_floor[rest] = heavy_threshold(values, weight, target[rest], self.top[rest], reach, self.scratch, share=share)
        return [k_floor, p_floor]

    def _head_share(self) -> Tensor:
        """About the probability of the HEAD best tokens, float64 [B]: as if each was the best of its group."""
        tops = self.group_tops.topk(min(HEAD, self.group_tops.shape[1]), sorted=False).values
        depth = tops - self.top[:, None] if self.temperature is None else (tops - self.top[:, None]) / self.temperature[:, None]
        return depth.double().exp_().sum(-1) * self.peak / _UNIT

    def _head(self, short: Tensor, compact: Tensor, top_k: Tensor) -> tuple[Tensor, Best]:
        """The marked rows [R] and their best tokens, as many as the marks ask for."""
        rows = (short | compact).nonzero()[:, 0]
        if len(rows) == 0:
            return rows, Best(self.values[rows, :1], rows[:, None])
        depth = HEAD if bool(compact.any()) else int(top_k[short].amax())
        return rows, find_best(self.values, self.group_tops, min(depth, self.values.shape[1]), rows)

    def _mass_above(self, floor: Tensor, rows: Tensor) -> Tensor:
        """The mass of values >= floor for the rows marked, the whole mass of the others."""
        if not bool(rows.any()):
            return self.mass
        mass = torch.zeros_like(self.peak) if bool(rows.all()) else self.mass.clone()
        mass[rows] = self._at_least(floor[rows], rows).sums(self.scratch).sum(-1)
        return mass

    def _at_least(self, floor: Tensor, rows: Tensor | None = None) -> _Kept:
        """The tokens with values >= floor [R], of the rows marked in bool [B] (None: all).

        Of few groups where their maxima leave few in every row; otherwise of all.
        """
        tops = self.group_tops if rows is None else self.group_tops[rows]
        count = int((tops >= floor[:, None]).sum(-1).amax())
        if SPARSE * count <= tops.shape[1]:
            groups = tops.topk(count, sorted=False).indices.sort(-1).values
            index = None if rows is None else rows.nonzero()[:, 0]
            weight, values = (gathered(whole, groups, index) for whole in (self.weight, self.values))
            return _Kept(groups, weight, values, floor)
        if rows is None:
            return _Kept(None, self.weight, self.values, floor)
        weight, values = self.scratch.rows("picked weight", self.weight, rows), self.scratch.rows("picked", self.values, rows)
        return _Kept(None, weight, values, floor)

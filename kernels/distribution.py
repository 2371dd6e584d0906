"""One softmax per row, filtered by value and drawn from by inverse CDF.

Probabilities are held as integers in units of 2^-52, in fp32 (a rounded fp32 loses nothing of that size that it had).
Sums of them are exact in float64 whatever the order, so a row's mass, filters and draw are the same bits in every batch.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .scratch import GROUP, Scratch
from .threshold import heavy_threshold

HEAD = 128  # filters that end among this many best tokens are found by a partial sort
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


class _Best(NamedTuple):
    values: Tensor  # [R, n]
    ids: Tensor  # [R, n]


class Distribution:
    """softmax(values / temperature) of each row; `restrict` takes tokens out of it, `draw` draws a token.

    values: fp32 [B, W] from `widened`, not modified. temperature: fp32 [B], > 0 (None: 1).
    Works in `scratch`: of the distributions that share one, only the newest may be used (a Scale stays good).
    """

    def __init__(self, values: Tensor, temperature: Tensor | None, scratch: Scratch) -> None:
        self.group_tops = self._groups(values).amax(-1)
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
        """Probability in units of 2^-52, fp32 [B, W]; 0 for what was taken out."""
        depth = self.values
        if self.temperature is not None:  # relative to the largest: division by a small temperature can't overflow
            depth = torch.sub(depth, self.top[:, None], out=self.scratch.like("mask", depth)).div_(self.temperature[:, None])
        return torch.softmax(depth, -1, out=self.scratch.like("weight", depth)).mul_(_UNIT).round_()

    @cached_property
    def peak(self) -> Tensor:
        """The largest weight, float64 [B]."""
        return self.weight.amax(-1).double()

    @cached_property
    def cumulative(self) -> Tensor:
        """The mass up to the end of every group of tokens, float64 [B, W / GROUP]."""
        return self._groups(self.weight).sum(-1, dtype=torch.float64).cumsum_(-1)

    @property
    def mass(self) -> Tensor:
        """The sum of the weights, float64 [B]."""
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
            self.weight.mul_(self._at_least(self.values, self.floor))
            self.__dict__.pop("cumulative", None)

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
        return group * GROUP + self._group(self.values, group).argmax(-1)

    def draw(self, uniform: Tensor) -> Tensor:
        """The first token id whose cumulative mass, in id order, exceeds uniform * mass. uniform: float64 [B] in [0, 1)."""
        mass = self.mass[:, None]
        aim = torch.minimum((uniform[:, None] * mass).floor_(), mass - 1)
        group = torch.searchsorted(self.cumulative, aim, right=True)
        before = torch.where(group > 0, self.cumulative.gather(-1, (group - 1).clamp_(min=0)), 0.0)
        inside = self._group(self.weight, group[:, 0]).double().cumsum_(-1)
        return (group * GROUP + torch.searchsorted(inside, aim - before, right=True))[:, 0]

    def _groups(self, values: Tensor) -> Tensor:
        return values.view(len(values), -1, GROUP)

    def _group(self, values: Tensor, group: Tensor) -> Tensor:
        """One group of each row, [B, GROUP]. values: [B, W], group: int64 [B]."""
        return self._groups(values).gather(1, group[:, None, None].expand(-1, 1, GROUP))[:, 0]

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
        if bool(compact.any()):  # a token weighs `peak` at most, so a larger nucleus can't end within the head
            compact &= top_p * self.mass <= HEAD * self.peak
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
        target = top_p * self._mass_above(k_floor, limited & nucleus)
        p_floor = torch.full_like(self.top, -torch.inf)
        if len(rows):
            mass = self.weight[rows[:, None], best.ids].double().cumsum_(-1)
            place = torch.searchsorted(mass, target[rows][:, None])
            reached = (place < mass.shape[1])[:, 0] & nucleus[rows]
            p_floor[rows[reached]] = best.values[reached].gather(-1, place[reached])[:, 0]
        rest = nucleus & (p_floor == -torch.inf)
        if bool(rest.any()):
            reach = REACH if self.temperature is None else REACH * self.temperature[rest]
            values, weight = self.scratch.rows("picked", self.values, rest), self.scratch.rows("picked weight", self.weight, rest)
            p_floor[rest] = heavy_threshold(values, weight, target[rest], self.top[rest], reach, self.scratch)
        return [k_floor, p_floor]

    def _head(self, short: Tensor, compact: Tensor, top_k: Tensor) -> tuple[Tensor, _Best]:
        """The marked rows [R] and their best tokens, as many as the marks ask for, in descending order."""
        marked = short | compact
        rows = marked.nonzero()[:, 0]
        if len(rows) == 0:
            return rows, _Best(self.values[rows, :1], rows[:, None])
        depth = HEAD if bool(compact.any()) else int(top_k[short].amax())
        return rows, _Best(*self.scratch.rows("picked", self.values, marked).topk(min(depth, self.values.shape[1])))

    def _mass_above(self, floor: Tensor, rows: Tensor) -> Tensor:
        """The mass of values >= floor for the rows marked, the whole mass of the others."""
        if not bool(rows.any()):
            return self.mass
        mass = self.mass.clone()
        kept = self._at_least(self.scratch.rows("picked", self.values, rows), floor[rows])
        mass[rows] = kept.mul_(self.scratch.rows("picked weight", self.weight, rows)).sum(-1, dtype=torch.float64)
        return mass

    def _at_least(self, values: Tensor, floor: Tensor) -> Tensor:
        """1.0 where values >= floor, else 0.0: on a CPU a comparison that yields bools is several times slower."""
        return torch.ge(values, floor[:, None], out=self.scratch.like("mask", values))

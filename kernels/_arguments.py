"""Argument checks that the sampling kernels share."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

PerRow: TypeAlias = float | int | Tensor


def check_logits(logits: Tensor) -> None:
    """Raises ValueError unless `logits` is a floating [B, V] with V >= 1."""
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits must be floating point of shape [B, V] with V >= 1, not {logits.dtype} {list(logits.shape)}")


class Range(NamedTuple):
    """What a parameter may be: finite, at least (`above`: more than) `low`, and at most `high`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {'(' if self.above else '['}{self.low}, {self.high}]"
        return "finite" if self.low == -math.inf else f"finite and {'>' if self.above else '>='} {self.low}"

    def holds(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and value <= self.high and abs(value) < math.inf

    def all_hold(self, values: Tensor) -> bool:
        """Values on a GPU are taken on trust: to look at them is to wait for them."""
        if values.is_cuda:
            return True
        least, most = (float(edge) for edge in values.aminmax()) if values.numel() else (self.high, self.high)
        return self.holds(least) and self.holds(most)  # aminmax hands NaN on, and that fails


def per_row(name: str, value: PerRow, logits: Tensor, dtype: torch.dtype, allowed: Range | None = None) -> Tensor:
    """`value` as a tensor [B] of `dtype` on the device of `logits`; a number is taken for every row.

    Raises ValueError for another shape, for fractions where `dtype` is an integer type, and outside of `allowed`.
    """
    rows = logits.shape[0]
    whole = not dtype.is_floating_point
    if not isinstance(value, Tensor):
        if whole and not isinstance(value, int):
            raise ValueError(f"{name}={value!r} is refused: it must be an integer")
        if allowed and not allowed.holds(value):
            raise ValueError(f"{name}={value!r} is refused: it must be {allowed}")
        return torch.full((rows,), value, dtype=dtype, device=logits.device)
    if value.shape != (rows,) or (whole and value.is_floating_point()):
        kind = "integer" if whole else "number"
        raise ValueError(f"{name} must be one {kind} or a {kind} per row, [{rows}], not {value.dtype} {list(value.shape)}")
    if allowed and rows and not allowed.all_hold(value):
        raise ValueError(f"{name} is refused: every row's must be {allowed}, not {value.tolist()}")
    return value.to(logits.device, dtype)


def check_places(logits: Tensor, *places: Tensor) -> None:
    """Raises ValueError unless `places` (row, token, ...) are parallel integer vectors [N]."""
    if len({place.shape for place in places}) != 1 or any(place.ndim != 1 or place.is_floating_point() for place in places[:2]):
        shapes = ", ".join(f"{place.dtype} {list(place.shape)}" for place in places)
        raise ValueError(f"rows and token ids (and what belongs to them) must be parallel vectors [N], ids integer, not {shapes}")
    rows, vocab = logits.shape
    for name, place, end in (("row", places[0], rows), ("token id", places[1], vocab)):
        if place.is_cuda:  # taken on trust: to look at them is to wait for them
            continue
        least, most = (int(edge) for edge in place.aminmax()) if place.numel() else (0, 0)
        if least < 0 or most >= end:
            raise ValueError(f"{name}s must be in [0, {end}), not in [{least}, {most}]")


def check_history(logits: Tensor, tokens: Tensor, length: Tensor) -> None:
    """Raises ValueError unless `tokens` is an integer [B, L] and `length` an integer [B] with values in [0, L]."""
    rows = logits.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != rows or tokens.is_floating_point():
        raise ValueError(f"tokens must be integers of shape [{rows}, L], not {tokens.dtype} {list(tokens.shape)}")
    if length.shape != (rows,) or length.is_floating_point():
        raise ValueError(f"length must be integers of shape [{rows}], not {length.dtype} {list(length.shape)}")
    least, most = (int(edge) for edge in length.aminmax()) if rows and not length.is_cuda else (0, 0)
    if least < 0 or most > tokens.shape[1]:
        raise ValueError(f"length must be in [0, {tokens.shape[1]}], not in [{least}, {most}]")


def fp32(logits: Tensor, out: Tensor | None) -> Tensor:
    """`logits` [B, V] as fp32, to be modified: a copy, or `out`, which may be `logits`. Raises ValueError for a wrong `out`."""
    if out is None:
        return logits.to(torch.float32, copy=True)
    if out.shape != logits.shape or out.dtype != torch.float32:
        raise ValueError(f"out must be float32 of shape {list(logits.shape)}, not {out.dtype} {list(out.shape)}")
    return out if out is logits else out.copy_(logits)

"""Temperature, top-k, top-p and min-p: the stages that shape a distribution before a token is drawn.

Each takes logits [B, V] of any floating type and returns new fp32 logits [B, V] in which the tokens taken out are
-inf. A parameter is one number or a tensor [B]. Rows that are NaN, or nothing but -inf, come back as they are.
Semantics follow Hugging Face's logits warpers; thresholds are on the value, so all its ties stay.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import native_sampling as native
from ._arguments import PerRow, Range, check_logits, per_row
from .distribution import Distribution
from .scratch import Scratch, thread_scratch, widened

GREEDY = 1e-5  # a smaller temperature means the most probable token


def apply_temperature(logits: Tensor, temperature: PerRow) -> Tensor:
    """logits / temperature; rows with a temperature below 1e-5 (greedy) stay as they are.

    Raises ValueError for a negative or non-finite temperature.
    """
    divisor = check_temperature(logits, temperature)
    return logits.float() / torch.where(divisor < GREEDY, 1.0, divisor)[:, None]


def apply_top_k(logits: Tensor, top_k: PerRow) -> Tensor:
    """Keeps the k most probable tokens and every tie of the last; 0, -1 and k >= V are off."""
    rows = logits.new_zeros(len(logits), dtype=torch.float64)
    return _filter(logits, check_top_k(logits, top_k), rows + 1, rows)


def apply_top_p(logits: Tensor, top_p: PerRow) -> Tensor:
    """Keeps the smallest set of most probable tokens whose mass is >= p, and every tie of the last; 1 is off.

    Holtzman et al., "The curious case of neural text degeneration" (2020).
    """
    rows = logits.new_zeros(len(logits), dtype=torch.float64)
    return _filter(logits, rows.long(), check_top_p(logits, top_p), rows)


def apply_min_p(logits: Tensor, min_p: PerRow) -> Tensor:
    """Keeps the tokens that are at least min_p times as probable as the best; 0 is off."""
    rows = logits.new_zeros(len(logits), dtype=torch.float64)
    return _filter(logits, rows.long(), rows + 1, check_min_p(logits, min_p))


def check_temperature(logits: Tensor, value: PerRow) -> Tensor:
    """fp32 [B]. Here and below: raises ValueError for a wrong shape or a value out of range."""
    check_logits(logits)
    return per_row("temperature", value, logits, torch.float32, Range(0))


def check_top_k(logits: Tensor, value: PerRow) -> Tensor:
    """int64 [B]."""
    check_logits(logits)
    return per_row("top_k", value, logits, torch.int64, Range(-1))


def check_top_p(logits: Tensor, value: PerRow) -> Tensor:
    """float64 [B]."""
    check_logits(logits)
    return per_row("top_p", value, logits, torch.float64, Range(0, 1, above=True))


def check_min_p(logits: Tensor, value: PerRow) -> Tensor:
    """float64 [B]."""
    check_logits(logits)
    return per_row("min_p", value, logits, torch.float64, Range(0, 1))


def _filter(logits: Tensor, *limits: Tensor) -> Tensor:
    """limits: top_k, top_p, min_p."""
    floor = _native_floor(logits, *limits) if native.takes(logits) else _floor(logits, *limits)
    kept = logits.to(torch.float32, copy=True)
    return kept if floor is None else kept.masked_fill_(kept < floor[:, None], -torch.inf)


def _floor(logits: Tensor, *limits: Tensor) -> Tensor | None:
    """The smallest value of each row that passes, fp32 [B]; -inf for bad rows."""
    scratch = Scratch()
    dist = Distribution(widened(logits, scratch), None, scratch)
    floor = dist.find_floor(*limits)
    return None if floor is None else floor.masked_fill(dist.bad, -torch.inf)


def _native_floor(logits: Tensor, *limits: Tensor) -> Tensor:
    given = native.entries(logits, np.arange(len(logits)))
    given["temperature"], given["flags"] = 1, native.SHAPED
    for name, value in zip(("top_k", "top_p", "min_p"), limits, strict=True):
        given[name] = value.numpy()
    found, _ = native.read(logits, given, thread_scratch(logits.device), token=False)
    return found.floor

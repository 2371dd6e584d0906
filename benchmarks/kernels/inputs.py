"""Rows of logits like those that models give: peaked or flat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagefork.kernels.entries import ENTRY

BATCHES = (8, 64, 256, 1, 512)  # the cases that say most come first, since time may run out
VOCABS = (128256, 32000, 151936, 262144)
PEAK = 2.0  # exponent of Zipf's law; a dozen tokens hold 95 % of the mass


def rows(kind: str, batch: int, vocab: int, seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Logits [batch, vocab]. "peaked": probabilities fall by Zipf's law, in no order of ids. "flat": normal, of deviation 1.

    Raises ValueError for another kind.
    """
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(batch, vocab, device=device)
    if kind == "peaked":  # if rank = u V with u uniform, then -log(rank) is exponential but for a constant
        out.exponential_(generator=generator).mul_(PEAK)
    elif kind == "flat":
        out.normal_(generator=generator)
    else:
        raise ValueError(f"rows={kind!r} is refused: peaked or flat")
    return out.to(dtype)


def entries(count: int, device: torch.device, **fields: Any) -> Tensor:
    """int32 [count, WORDS]: one entry per row, of these fields; what is not given is off."""
    records = np.zeros(count, ENTRY)
    numbers = np.arange(count)
    given = {"temperature": 1.0, "top_p": 1.0, "min_p_depth": -np.inf, "repetition": 1.0, "row": numbers, "slot": numbers}
    for name, value in {**given, "seed": numbers, "position": 100, **fields}.items():
        records[name] = value
    return torch.from_numpy(records.view(np.int32).reshape(count, -1)).to(device)


def grid(**axes: Sequence[int | str]) -> list[dict[str, int | str]]:
    """Every combination; the last axis varies first."""
    shapes: list[dict[str, int | str]] = [{}]
    for name, values in axes.items():
        shapes = [{**shape, name: value} for shape in shapes for value in values]
    return shapes

"""Rows and limits of every kind, the entries that ask for them, and whether draws are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pagefork.kernels.draw import Draws, draw
from pagefork.kernels.entries import ENTRY, Entry
from pagefork.kernels.group_stats import group_stats

Params = dict[str, NDArray[Any]]


def cases(vocab: int, count: int, seed: int) -> tuple[torch.Tensor, Params]:
    """Rows of every shape and limits of every kind, one set per row."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, vocab)) * rng.choice([0.3, 1.0, 4.0, 12.0], (count, 1))
    logits[rng.random((count, vocab)) < rng.choice([0.0, 0.5], (count, 1), p=[0.8, 0.2])] = -np.inf
    logits[np.arange(count), rng.integers(0, vocab, count)] = 1.5
    return torch.from_numpy(logits.astype(np.float32)), {
        "temperature": rng.choice([0.0, 0.3, 0.7, 1.0, 1.5, 100.0], count).astype(np.float32),
        "top_k": rng.choice([0, -1, 1, 2, 20, 64, 128, 129, 400, vocab, vocab + 1, 2**30], count),
        "top_p": rng.choice([1.0, 1.0, 0.95, 0.9, 0.5, 0.1, 1e-6], count),
        "min_p": rng.choice([0.0, 0.0, 0.0, 0.02, 0.3, 1.0], count),
        "seed": rng.integers(-(2**63), 2**63, count),
        "stream": rng.integers(0, 2**63, count),
        "position": rng.integers(0, 2**31, count),
    }


def entries(params: Params, device: torch.device) -> torch.Tensor:
    """One entry per row, that reports the processed distribution."""
    greedy = params["temperature"] < 1e-5
    heat = np.where(greedy, np.float32(1), params["temperature"])
    records = np.zeros(len(greedy), ENTRY)
    records["row"] = np.arange(len(greedy))
    records["flags"] = np.where(greedy, Entry.GREEDY, 0) | np.where(heat != 1, Entry.OWN, 0) | Entry.PROCESSED
    records["temperature"] = heat
    with np.errstate(divide="ignore"):
        records["min_p_depth"] = heat.astype(np.float64) * np.log(params["min_p"])
    for name in ("top_k", "top_p", "seed", "stream", "position"):
        records[name] = params[name]
    return torch.from_numpy(records.view(np.int32).reshape(len(records), -1)).to(device)


def run(logits: torch.Tensor, given: torch.Tensor, filtered: bool = True) -> Draws:
    return draw(logits, given, group_stats(logits, given, True), None, filtered=filtered)


def flat(found: Draws) -> list[torch.Tensor]:
    return [found.token, found.logprob, found.bad, *found.model, *found.processed]


def same(one: Draws, other: Draws, rows: Any = slice(None)) -> bool:
    return all(torch.equal(a, b[rows]) for a, b in zip(flat(one), flat(other), strict=True))


def plain(count: int, **changes: Any) -> Params:
    """Draws at consecutive positions of one stream."""
    off = {"temperature": np.float32(1), "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 123, "stream": 5}
    filled = {name: np.full(count, changes.get(name, value)) for name, value in off.items()}
    return {**filled, "temperature": filled["temperature"].astype(np.float32), "position": np.arange(count)}

"""The threshold is the exact order statistic by weight, whatever the values look like."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagefork.kernels.scratch import Scratch
from pagefork.kernels.threshold import FEW, heavy_threshold

N = 2 * FEW + 64
RNG = np.random.default_rng(7)


def outliers() -> np.ndarray:
    values = RNG.normal(size=N) * 1e-3
    values[:3] = -1e38, 1e30, -3e38
    return values


SHAPES = {
    "normal": RNG.normal(size=N),
    "few distinct values": RNG.integers(0, 7, N).astype(float),
    "coarse": torch.randn(N, generator=torch.Generator().manual_seed(0)).bfloat16().double().numpy(),
    "all equal": np.full(N, -3.25),
    "all but one equal": np.r_[np.full(N - 1, 2.0), 2.5],
    "peaked": np.r_[RNG.normal(size=N - 5) - 20, RNG.normal(size=5)],
    "outliers": outliers(),
    "mostly banned": np.where(np.arange(N) % 100 > 0, -np.inf, RNG.normal(size=N)),
    "subnormal": RNG.normal(size=N) * 1e-40,
    "wide": RNG.normal(size=N) * 1e37,
}


def brute(values: np.ndarray, weight: np.ndarray, target: float) -> float:
    order = np.argsort(-values, kind="stable")
    mass = np.cumsum([int(w) for w in weight[order]], dtype=object)  # exact
    return values[order][next(i for i, m in enumerate(mass) if m >= target)]


@pytest.mark.parametrize("columns", [N, FEW, 5])
@pytest.mark.parametrize("weighted", [True, False])
def test_threshold_equals_the_sorted_one(columns: int, weighted: bool) -> None:
    values = np.stack([shape[:columns] for shape in SHAPES.values()]).astype(np.float32)
    weight = np.exp(np.clip(values - values.max(-1, keepdims=True), -700, 0).astype(float))
    weight = np.round(weight * 2**30 + 1).astype(np.float32) if weighted else np.ones_like(values)
    for share in (1e-9, 0.1, 0.5, 0.95, 0.999, 1.0):
        target = np.maximum(weight.sum(-1, dtype=float) * share, 1e-3)
        tensors = torch.from_numpy(values), torch.from_numpy(weight) if weighted else None, torch.from_numpy(target)
        found = heavy_threshold(*tensors, tensors[0].amax(-1), torch.inf, Scratch())
        for name, row, heavy, aim, t in zip(SHAPES, values, weight, target, found.numpy(), strict=True):
            expected = brute(row, heavy, aim)
            same_set = (row >= t) == (row >= expected)
            assert same_set[np.isfinite(row)].all(), (name, share, t, expected)


@pytest.mark.parametrize("columns", [N, FEW])
def test_a_share_means_that_part_of_the_sum_of_weights(columns: int) -> None:
    values = torch.from_numpy(np.stack([SHAPES["normal"], SHAPES["coarse"]])[:, :columns].astype(np.float32))
    weight = (values.exp() * 2**30).round_()
    share = torch.tensor([0.3, 0.9], dtype=torch.float64)
    given = values.amax(-1), torch.inf, Scratch()
    found = heavy_threshold(values, weight, share, *given, share=True)
    for row, heavy, part, t in zip(values.numpy(), weight.numpy(), share.tolist(), found.tolist(), strict=True):
        assert t == brute(row, heavy, part * heavy.sum(dtype=float))


@pytest.mark.parametrize("reach", [1e-3, 0.5, 40.0])
def test_a_wrong_guess_of_the_reach_costs_time_only(reach: float) -> None:
    values = torch.from_numpy(np.stack([SHAPES["normal"], SHAPES["coarse"], SHAPES["all equal"]]).astype(np.float32))
    weight, target = torch.ones_like(values), torch.tensor([2000.0, 700.0, 5.0], dtype=torch.float64)
    found = heavy_threshold(values, weight, target, values.amax(-1), torch.inf, Scratch())
    for guess in (reach, torch.tensor([reach, 2 * reach, 40.0])):
        assert torch.equal(heavy_threshold(values, weight, target, values.amax(-1), guess, Scratch()), found)

"""What is read of few groups is what the whole row says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagefork.kernels import sample
from pagefork.kernels.groups import find_best, gathered, group_sums, grouped, token_ids
from pagefork.kernels.scratch import Scratch


def rows(groups: int) -> torch.Tensor:
    """Continuous rows and coarse ones, full of ties."""
    values = torch.randn(6, 64 * groups, generator=torch.Generator().manual_seed(groups))
    values[3:] = values[3:].mul(2).round()
    return values


@pytest.mark.parametrize("groups", [1, 5, 40])
def test_the_best_tokens_lie_in_the_groups_of_the_largest_maxima(groups: int) -> None:
    values = rows(groups)
    tops = grouped(values).amax(-1)
    for some in (None, torch.tensor([4, 0, 3])):
        chosen = values if some is None else values[some]
        for n in (1, 3, 63, 64):
            best = find_best(values, tops, n, some)
            assert torch.equal(best.values, chosen.sort(-1, descending=True).values[:, :n])
            assert torch.equal(chosen.gather(-1, best.ids), best.values)
            assert all(len(ids.unique()) == n for ids in best.ids)


def test_gathered_columns_know_their_tokens() -> None:
    values = torch.arange(3 * 320).view(3, 320)
    groups = torch.tensor([[4, 1], [0, 3]])
    some = torch.tensor([2, 0])
    place = torch.arange(128).expand(2, -1)
    assert torch.equal(gathered(values, groups, some), values[some].gather(-1, token_ids(groups, place)))


def test_sums_of_groups_are_exact_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.rand(7, 320, generator=torch.Generator().manual_seed(1)).mul(2.0**52).round()
    values, floor = weight.flip(-1).contiguous(), torch.linspace(0.0, 2.0**52, 7)
    parts = weight, weight * (values >= floor[:, None])
    exact, filtered = ([[sum(int(w) for w in group) for group in row] for row in grouped(part).tolist()] for part in parts)
    for size in (1, 700, 10**9):
        monkeypatch.setattr("pagefork.kernels.scratch.SLICE", size)
        assert group_sums(weight, Scratch()).tolist() == exact
        assert group_sums(weight, Scratch(), values, floor).tolist() == filtered


def test_draws_are_the_same_of_few_groups_and_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: which way is taken depends on the other rows of the batch."""
    logits = rows(80) * 4
    spec = {
        "temperature": torch.tensor([1.0, 0.5, 0.8, 1.0, 0.7, 1.0]),
        "top_k": torch.tensor([5, 0, 9, 3, 0, 0]),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 1.0, 1.0, 0.3]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.3, 0.0]),
    }
    found = []
    for sparse in (0, 10**9):
        monkeypatch.setattr("pagefork.kernels.distribution.SPARSE", sparse)
        found.append([sample(logits, position=position, **spec) for position in range(20)])
    for few, all_groups in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(few, all_groups, strict=True))
        assert np.isfinite(few.logprob.numpy()).all()

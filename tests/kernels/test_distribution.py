"""Masses are exact integers, so draws at the very boundaries of the CDF are decided, not rounded."""

from __future__ import annotations

import numpy as np
import torch

from pagefork.kernels.distribution import Distribution
from pagefork.kernels.scratch import Scratch, widened

ULP = 2.0**-53


def build(logits: torch.Tensor, temperature: torch.Tensor | None = None) -> Distribution:
    scratch = Scratch()
    return Distribution(widened(logits, scratch), temperature, scratch)


def test_weights_are_integers_whose_sums_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50_000, generator=generator) * torch.tensor([0.0, 0.1, 1.0, 5.0, 20.0, 80.0])[:, None]
    dist = build(logits)
    weight = dist.weight.double()
    assert torch.equal(weight, weight.round())
    exact = [sum(int(w) for w in row) for row in weight.tolist()]
    assert dist.mass.tolist() == exact
    assert weight.flip(-1).cumsum(-1)[:, -1].tolist() == exact
    assert max(exact) < 2**53


def test_a_boundary_of_the_cdf_belongs_to_the_next_token() -> None:
    """Four tokens of exactly a quarter each, with impossible ones before, between and after, in other groups too."""
    ids = torch.tensor([3, 64, 65, 190])
    logits = torch.full((1, 200), -torch.inf)
    logits[0, ids] = 2.5
    for u, place in ((0.0, 0), (0.25 - ULP, 0), (0.25, 1), (0.5 - ULP, 1), (0.5, 2), (0.75 - ULP, 2), (0.75, 3), (1 - ULP, 3)):
        assert build(logits).draw(torch.tensor([u], dtype=torch.float64)).item() == ids[place]


def test_the_best_is_the_lowest_of_ties() -> None:
    generator = torch.Generator().manual_seed(3)
    for vocab in (1, 64, 65, 4097):
        coarse = torch.randn(5, vocab, generator=generator).round()
        for logits in (coarse, coarse * 5e37, torch.zeros(2, vocab)):
            assert build(logits).best().tolist() == [int(np.argmax(row)) for row in logits.numpy()]


def test_whatever_the_number_a_kept_token_is_drawn() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 999, generator=generator)
    for u in (0.0, 2.0**-52, 0.5, 1 - 2 * ULP, 1 - ULP):
        dist = build(logits, torch.full((4,), 0.3))
        dist.restrict(torch.tensor([0, 3, 1, 40]), torch.tensor([0.9, 1.0, 1.0, 0.5]), torch.tensor([0.0, 0.0, 0.0, 0.2]))
        assert dist.floor is not None
        drawn = logits.gather(-1, dist.draw(torch.full((4,), u, dtype=torch.float64))[:, None])[:, 0]
        assert (drawn >= dist.floor).all()


def test_log_probs_of_what_is_kept_sum_to_one_and_the_rest_is_impossible() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(2))
    dist = build(logits)
    dist.restrict(torch.tensor([0, 7, 0]), torch.tensor([1.0, 1.0, 0.6]), torch.zeros(3))
    logp = dist.scale().log_probs(logits)
    np.testing.assert_allclose(logp.double().exp().sum(-1).numpy(), 1.0, atol=2e-6)
    assert logp[1].isfinite().sum() == 7
    assert (logp[2].isfinite() == (logits[2] >= dist.scale().floor[2])).all()

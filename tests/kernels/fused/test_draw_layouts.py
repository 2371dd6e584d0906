"""No batch, order or layout changes a draw, draws follow the distribution, and rows that are none are flagged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from support.draws import cases, entries, flat, plain, run, same

from pagefork.kernels import draw as module
from pagefork.kernels._triton import INTERPRETED

DRAWS = 400 if INTERPRETED else 1_000_000


def test_no_batch_no_order_and_no_layout_changes_a_bit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    count, vocab = (64, 200) if INTERPRETED else (257, 128_256)
    logits, params = cases(vocab, count, 11)
    logits, given = logits.to(device), entries(params, device)
    together = run(logits, given)
    order = torch.from_numpy(np.random.default_rng(0).permutation(count)).to(device)
    shuffled = given[order]  # they name their rows, which stay where they are
    assert same(run(logits, shuffled), together, order)
    for begin, size in ((0, 1), (7, 1), (3, 3), (0, 64))[: 3 if INTERPRETED else 4]:
        assert same(run(logits, given[begin : begin + size]), together, slice(begin, begin + size))
    strided = torch.full((count, vocab + 3), torch.nan, device=device)
    strided[:, 1 : vocab + 1] = logits
    monkeypatch.setattr(module, "power_of_two", lambda n, least: max(least, 2 << (n - 1).bit_length()))
    assert same(run(strided[:, 1 : vocab + 1], given[:5]), together, slice(0, 5))


@pytest.mark.parametrize("spec", [{}, {"temperature": 2.0, "min_p": 0.2}])
def test_draws_follow_the_distribution(spec: dict[str, Any], device: torch.device) -> None:
    """Chi-square over the positions of one stream, bound df + 6 sqrt(2 df); all of them draws from one row."""
    row = np.random.default_rng(2).normal(size=6 if INTERPRETED else 128_256).astype(np.float32)
    given = entries(plain(DRAWS, **spec), device)
    given[:, 0] = 0
    logits = torch.from_numpy(row)[None].to(device)
    parts = [run(logits, part, filtered=bool(spec)).token for part in given.split(50_000)]
    count = np.bincount(torch.cat(parts).cpu().numpy(), minlength=len(row))
    probs = book.kept(row, spec).probs
    assert count[probs == 0].sum() == 0
    large = probs * DRAWS >= 5
    expected = np.append(probs[large], max(probs[~large].sum(), 1e-9)) * DRAWS
    found = np.append(count[large], count[~large].sum())
    df = int(large.sum())
    assert ((found - expected) ** 2 / expected).sum() < df + 6 * np.sqrt(2 * df)


def test_degenerate_rows_are_flagged_and_their_neighbours_do_not_notice(device: torch.device) -> None:
    logits, params = cases(130, 12, 9)
    logits, given = logits.to(device), entries(params, device)
    expected = run(logits, given)
    logits[1], logits[3], logits[5, 70], logits[7, 0] = -torch.inf, torch.nan, torch.nan, torch.inf
    found = run(logits, given)
    bad = torch.tensor([i in (1, 3, 5, 7) for i in range(12)], device=device)
    assert torch.equal(found.bad, bad) and torch.equal(found.model.bad, bad) and torch.equal(found.processed.bad, bad)
    assert (found.token[bad] == 0).all() and (found.logprob[bad] == 0).all()
    good = [i for i in range(12) if i not in (1, 3, 5, 7)]
    assert all(torch.equal(a[good], b[good]) for a, b in zip(flat(found), flat(expected), strict=True))


def test_extreme_values_and_limits(device: torch.device) -> None:
    rows = torch.zeros(7, 200)
    rows[1], rows[1, 150] = -1e38, 1e38
    rows[2, ::2], rows[2, 1::2] = 1e38, -1e38
    rows[3], rows[3, 77] = -torch.inf, -5.0
    rows[4, :100], rows[4, 130] = -torch.inf, 3e38
    rows[5] = torch.where(torch.arange(200) % 3 == 0, 0.0, -0.0)
    rows[6] = torch.arange(200.0)
    limits: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_k": 2**30, "top_p": 1e-6},
        {"top_p": 1 - 2.0**-24, "temperature": 100.0},
        {"temperature": 1e-3, "top_k": 200},
        {"min_p": 1.0, "top_k": 201, "temperature": 1e-3},
    ]
    for spec in limits:
        given = plain(7, **spec)
        found = run(rows.to(device), entries(given, device))
        assert not found.bad.any() and found.logprob.isfinite().all()
        for i, row in enumerate(rows.numpy()):
            kept = book.kept(row, {name: values[i].item() for name, values in given.items()})
            assert kept.mask[int(found.token[i])]
            assert abs(float(found.logprob[i]) - np.log(kept.probs[int(found.token[i])])) < 2e-5

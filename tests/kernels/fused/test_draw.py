"""Draws from records are those of the float64 pipeline, whatever the limits and the way to find them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from support.draws import cases, entries, plain, run, same

from pagefork.kernels import draw as module
from pagefork.kernels._flat import flat_kernel
from pagefork.kernels._triton import INTERPRETED
from pagefork.kernels.entries import Entry
from pagefork.kernels.group_stats import group_stats
from pagefork.kernels.scales import model_scale, own_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_to_find_limits_give_the_same_bits(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among few candidates, and by passes over all groups that may matter, in the second kernel."""
    logits, params = cases(2049, 6 if INTERPRETED else 500, 5)
    params["temperature"] = np.maximum(params["temperature"], np.float32(0.3))
    params["top_k"] = np.resize([20, 0, 50, 5, 0, 0], len(logits))
    params["top_p"] = np.resize([1.0, 0.5, 0.9, 0.3, 1.0], len(logits))
    params["min_p"] = np.resize([0.0, 0.0, 0.2, 0.1], len(logits))
    logits, given = logits.to(device, dtype), entries(params, device)
    few = run(logits, given)
    undecided, launch = [], module.launch

    def noted(kernel: Any, *args: Any, **more: Any) -> None:
        if kernel is flat_kernel:
            undecided.append(int((args[9] < 0).sum()))
        launch(kernel, *args, **more)

    monkeypatch.setattr(module, "CANDIDATES", 1)
    monkeypatch.setattr(module, "launch", noted)
    many = run(logits, given)
    assert undecided[0] > len(logits) // 2
    assert same(few, many)


@pytest.mark.parametrize(
    ("vocab", "top_k", "top_p", "min_p", "scale"),
    [
        *((9001, 300, 1.0, 0.0, 1), (9001, 0, 0.9, 0.0, 0.3), (9001, 0, 1.0, 1e-4, 1), (9001, 500, 0.8, 0.01, 1)),
        *((9001, 6000, 0.999, 0.03, 1), (40_000, 0, 0.96, 0.0, 0.2)),
    ],
)
def test_flat_rows_keep_what_float64_keeps(
    vocab: int, top_k: int, top_p: float, min_p: float, scale: float, device: torch.device
) -> None:
    """More candidates than are compared with each other, and more groups than are tried first."""
    rows = scale * torch.randn(2, vocab, generator=torch.Generator().manual_seed(top_k))
    found = run(rows.to(device), entries(plain(2, top_k=top_k, top_p=top_p, min_p=min_p), device))
    for i, row in enumerate(rows.numpy()):
        kept = book.kept(row, {"top_k": top_k, "top_p": top_p, "min_p": min_p})
        assert kept.mask.sum() > 256 and kept.margin > 1e-6
        assert ((row >= float(found.processed.floor[i])) == kept.mask).all()
        assert int(found.token[i]) == book.draw(kept.probs, book.uniform(123, 5, i))[0]


def test_log_probs_are_the_models_own_unless_the_processed_ones_are_asked_for(device: torch.device) -> None:
    logits, params = cases(999, 8, 21)
    params["temperature"][:], params["top_k"][:] = 0.7, 5
    given = entries(params, device)
    given[::2, 1] = int(Entry.OWN)
    found, stats = run(logits.to(device), given), group_stats(logits.to(device), given, True)
    for i, row in enumerate(logits.numpy()):
        token = int(found.token[i])
        expected = book.log_softmax(row)
        if i % 2:
            kept = book.kept(row, {name: values[i].item() for name, values in params.items()})
            expected[token] = np.log(kept.probs[token])
        assert abs(float(found.logprob[i]) - expected[token]) < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(model_scale(stats), found.model, strict=True))
    whole = own_scale(stats, given).log_probs(logits.to(device)).cpu().numpy()
    expected = np.array([book.log_softmax(row / np.float64(np.float32(0.7))) for row in logits.numpy()])
    np.testing.assert_allclose(whole, expected, atol=2e-5)


def test_the_greedy_token_is_the_lowest_of_ties_and_has_limits_only_where_they_are_reported(device: torch.device) -> None:
    logits = torch.zeros(3, 200, device=device)
    logits[1, 77], logits[1, 150] = 3, 3
    logits[2, :100] = -torch.inf
    given = entries(plain(3, temperature=0.0, top_k=1), device)
    reported = run(logits, given)
    given[:, 1] = int(Entry.GREEDY)
    assert reported.token.tolist() == run(logits, given).token.tolist() == [0, 77, 100]
    np.testing.assert_allclose(reported.logprob.cpu(), -np.log([200, 2, 100]), atol=1e-6)
    assert (run(logits, given).processed.floor == -torch.inf).all()

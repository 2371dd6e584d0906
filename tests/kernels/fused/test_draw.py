"""Draws from records are those of the float64 pipeline, whatever the limits, the batch, the layout and the path taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import logits as book

from pagefork.kernels import draw as module
from pagefork.kernels._triton import INTERPRETED
from pagefork.kernels.draw import Draws, draw
from pagefork.kernels.entries import ENTRY, Entry
from pagefork.kernels.group_stats import group_stats
from pagefork.kernels.scales import model_scale, own_scale

VOCABS = [1, 2, 63, 64, 65, 999, 4097] + ([] if INTERPRETED else [32_000, 128_256, 262_144])
COUNT = 10 if INTERPRETED else 1000
DRAWS = 60 if INTERPRETED else 1_000_000
Params = dict[str, NDArray[Any]]


def cases(vocab: int, count: int, seed: int) -> tuple[torch.Tensor, Params]:
    """Rows of every shape and limits of every kind, one set per row."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, vocab)) * rng.choice([0.3, 1.0, 4.0, 12.0], (count, 1))
    logits[rng.random((count, vocab)) < rng.choice([0.0, 0.5], (count, 1), p=[0.8, 0.2])] = -np.inf
    logits[np.arange(count), rng.integers(0, vocab, count)] = 1.5
    return torch.from_numpy(logits.astype(np.float32)), {
        "temperature": rng.choice([0.0, 0.3, 0.7, 1.0, 1.5, 100.0], count).astype(np.float32),
        "top_k": rng.choice([0, 1, 2, 20, 64, 129, 400, vocab, vocab + 1, 2**30], count),
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


def run(logits: torch.Tensor, given: torch.Tensor) -> Draws:
    return draw(logits, given, group_stats(logits, given, True), None, filtered=True)


def flat(found: Draws) -> list[torch.Tensor]:
    return [found.token, found.logprob, found.bad, *found.model, *found.processed]


def same(one: Draws, other: Draws, rows: Any = slice(None)) -> bool:
    return all(torch.equal(a, b[rows]) for a, b in zip(flat(one), flat(other), strict=True))


def plain(count: int, **changes: Any) -> Params:
    """Draws at consecutive positions of one stream."""
    off = {"temperature": np.float32(1), "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 123, "stream": 5}
    filled = {name: np.full(count, changes.get(name, value)) for name, value in off.items()}
    return {**filled, "temperature": filled["temperature"].astype(np.float32), "position": np.arange(count)}


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_support_and_log_probs_are_those_of_float64(vocab: int, device: torch.device) -> None:
    """But for cases that float64 itself decides by less than 1e-6 of mass."""
    logits, params = cases(vocab, COUNT, vocab)
    found = run(logits.to(device), entries(params, device))
    support = found.processed.log_probs(logits.to(device)).isfinite().cpu().numpy()
    skipped = 0
    assert not found.bad.any()
    for i, row in enumerate(logits.numpy()):
        spec = {name: values[i].item() for name, values in params.items()}
        kept = book.kept(row, spec)
        token, margin = book.draw(kept.probs, book.uniform(spec["seed"], spec["stream"], spec["position"]))
        if spec["temperature"] < 1e-5:
            token, margin = int(np.argmax(row)), 1.0
        if min(kept.margin, margin) < 1e-6:
            skipped += 1
            continue
        assert int(found.token[i]) == token, (i, spec, margin)
        assert abs(float(found.logprob[i]) - np.log(kept.probs[token])) < 2e-5
        assert (support[i] == kept.mask).all(), (i, spec)
    assert skipped <= 1 + COUNT // 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_to_find_limits_give_the_same_bits(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among few candidates, and by passes over all groups that may matter."""
    logits, params = cases(2049, 6 if INTERPRETED else 500, 5)
    params["temperature"] = np.maximum(params["temperature"], np.float32(0.3))
    params["top_k"] = np.resize([20, 0, 50, 5, 0, 0], len(logits))
    params["top_p"] = np.resize([1.0, 0.5, 0.9, 0.3, 1.0], len(logits))
    params["min_p"] = np.resize([0.0, 0.0, 0.2, 0.1], len(logits))
    logits, given = logits.to(device, dtype), entries(params, device)
    few = run(logits, given)
    monkeypatch.setattr(module, "CANDIDATES", 0)
    many = run(logits, given)
    assert same(few, many)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "scale"), [(300, 1.0, 0.0, 1), (0, 0.9, 0.0, 0.3), (0, 1.0, 1e-4, 1), (500, 0.8, 0.01, 1)]
)
def test_flat_rows_keep_what_float64_keeps(top_k: int, top_p: float, min_p: float, scale: float, device: torch.device) -> None:
    """More candidates than are compared with each other."""
    rows = scale * torch.randn(2, 9001, generator=torch.Generator().manual_seed(top_k))
    found = run(rows.to(device), entries(plain(2, top_k=top_k, top_p=top_p, min_p=min_p), device))
    for i, row in enumerate(rows.numpy()):
        kept = book.kept(row, {"top_k": top_k, "top_p": top_p, "min_p": min_p})
        assert kept.mask.sum() > 256 and kept.margin > 1e-6
        assert ((row >= float(found.processed.floor[i])) == kept.mask).all()
        assert int(found.token[i]) == book.draw(kept.probs, book.uniform(123, 5, i))[0]


def test_no_batch_no_order_and_no_layout_changes_a_bit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    count, vocab = (9, 999) if INTERPRETED else (257, 128_256)
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
    row = np.random.default_rng(2).normal(size=12 if INTERPRETED else 128_256).astype(np.float32)
    given = entries(plain(DRAWS, **spec), device)
    given[:, 0] = 0
    logits = torch.from_numpy(row)[None].to(device)
    parts = [run(logits, part).token for part in given.split(50_000)]
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

"""A draw is a pure function of the row, its parameters and (seed, stream, position), and follows its distribution."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from support.draws import Params, cases

from pagefork.kernels import sample

pytestmark = pytest.mark.usefixtures("read_by")

VOCABS = [1, 2, 63, 64, 65, 999, 4097]
LARGE = 9001  # more than is searched by sorting


def run(logits: torch.Tensor, params: Params) -> Any:
    return sample(logits, **{name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in params.items()})


def test_tokens_and_log_probs_replay_the_float64_pipeline() -> None:
    """Cases that float64 itself decides by less than 1e-6 of mass are skipped: fewer than 1 in 1000."""
    count, skipped = 300, {"draw": 0, "support": 0}
    for vocab in [*VOCABS, LARGE]:
        logits, params = cases(vocab, count, vocab)
        found = run(logits, params)
        assert not found.bad.any()
        for i, row in enumerate(logits.numpy()):
            spec = {name: values[i].item() for name, values in params.items()}
            kept = book.kept(row, spec)
            if kept.margin < 1e-6:
                skipped["support"] += 1
                continue
            token, margin = book.draw(kept.probs, book.uniform(spec["seed"], spec["stream"], spec["position"]))
            if spec["temperature"] < 1e-5:
                token = int(np.argmax(row))
            elif margin < 1e-7:
                skipped["draw"] += 1
                continue
            assert int(found.token[i]) == token, (vocab, i, spec, margin)
            assert abs(float(found.logprob[i]) - np.log(kept.probs[token])) < 2e-5
    assert skipped["draw"] <= 2 and skipped["support"] <= 2, skipped


@pytest.mark.parametrize("vocab", [65, 999, LARGE])
def test_no_batch_changes_a_row(vocab: int) -> None:
    """Bit for bit: alone, in other batch sizes, in another order, at another place in memory."""
    logits, params = cases(vocab, 257, 11 * vocab)
    together = run(logits, params)
    order = np.random.default_rng(0).permutation(257)
    shuffled = run(logits[order], {name: values[order] for name, values in params.items()})
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled, together, strict=True))
    for size in (1, 3, 64):
        for begin in range(0, 257 - size, 40):
            part = slice(begin, begin + size)
            found = run(logits[part].clone(), {name: values[part] for name, values in params.items()})
            assert all(torch.equal(a, b[part]) for a, b in zip(found, together, strict=True)), (size, begin)
    strided = torch.full((257, vocab + 3), torch.nan)
    strided[:, 1 : vocab + 1] = logits
    assert all(torch.equal(a, b) for a, b in zip(run(strided[:, 1 : vocab + 1], params), together, strict=True))


@pytest.mark.parametrize("part", ["CHUNK", "SLICE"])
def test_no_chunk_changes_a_row(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, params = cases(LARGE, 64, 3)
    together = run(logits, params)
    for size in (1, LARGE, LARGE * 7, 10**9):
        monkeypatch.setattr(f"pagefork.kernels.scratch.{part}", size)
        assert all(torch.equal(a, b) for a, b in zip(run(logits, params), together, strict=True))


def test_threads_do_not_change_a_row() -> None:
    logits, params = cases(50_000, 1, 5)
    params["temperature"][:], params["top_k"][:] = 1.0, 0
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run(logits, params))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("spec", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 2.0, "min_p": 0.2}])
def test_draws_follow_the_distribution(spec: dict[str, float]) -> None:
    """Chi-square over 10^4 positions of one stream, bound df + 6 sqrt(2 df)."""
    draws, row = 10_000, np.random.default_rng(2).normal(size=40).astype(np.float32)
    found = sample(torch.from_numpy(row).expand(draws, -1), seed=123, stream=5, position=torch.arange(draws), **spec)  # type: ignore[arg-type]
    count = np.bincount(found.token.numpy(), minlength=40)
    probs = book.kept(row, spec).probs
    assert count[probs == 0].sum() == 0
    expected = probs * draws
    large = expected >= 5
    df = int(large.sum()) - 1
    chi = (((count - expected) ** 2)[large] / expected[large]).sum()
    assert chi < df + 6 * np.sqrt(2 * df)


def test_seed_stream_and_position_each_change_the_draws() -> None:
    logits = torch.zeros(200, 1000)
    base = sample(logits, position=torch.arange(200)).token
    for change in ({"seed": 1}, {"stream": 1}, {"stream": 2**32}):
        assert (sample(logits, position=torch.arange(200), **change).token != base).sum() > 150  # type: ignore[arg-type]
    assert len(base.unique()) > 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_ties(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 200, dtype=dtype)
    logits[1, 77], logits[1, 150] = 3, 3
    logits[2, :100] = -torch.inf
    found = sample(logits, temperature=0.0)
    assert found.token.tolist() == [0, 77, 100]
    assert sample(logits, temperature=9e-6).token.tolist() == [0, 77, 100]


def test_degenerate_rows_are_flagged_and_their_neighbours_do_not_notice() -> None:
    logits, params = cases(999, 12, 9)
    expected = run(logits, params)
    spoiled = logits.clone()
    spoiled[1], spoiled[3], spoiled[5, 700], spoiled[7, 0] = -torch.inf, torch.nan, torch.nan, torch.inf
    found = run(spoiled, params)
    bad = torch.tensor([i in (1, 3, 5, 7) for i in range(12)])
    assert torch.equal(found.bad, bad)
    assert (found.token[bad] == 0).all()
    assert torch.equal(found.token[~bad], expected.token[~bad]) and torch.equal(found.logprob[~bad], expected.logprob[~bad])
    assert run(torch.full_like(logits, torch.nan), params).bad.all()


@pytest.mark.parametrize("vocab", [200, LARGE])
def test_extreme_rows_and_parameters_stay_finite(vocab: int) -> None:
    rows = [torch.zeros(vocab), torch.full((vocab,), -1e38), torch.full((vocab,), -torch.inf), torch.linspace(-1e38, 1e38, vocab)]
    rows += [torch.linspace(0, 1e-38, vocab), torch.linspace(-1, 1, vocab) * 3e38]
    rows[2][vocab // 2] = -5.0
    logits = torch.stack(rows)
    for temperature in (0.0, 1e-4, 1e-3, 100.0):
        for top_p in (1e-6, 0.5, 1 - 2**-24, 1.0):
            for top_k in (0, 1, 150, 2**30):
                found = sample(logits, temperature=temperature, top_p=top_p, top_k=top_k, min_p=0.1, position=7)
                assert not found.bad.any()
                assert found.logprob.isfinite().all() and (found.logprob <= 0).all()
                assert found.token[2] == vocab // 2 and logits.gather(-1, found.token[:, None]).isfinite().all()


def test_logits_are_not_modified_and_may_require_grad() -> None:
    logits = torch.randn(5, 640, requires_grad=True)
    before = logits.detach().clone()
    for spec in ({}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 9, "top_p": 0.5, "min_p": 0.1}, {"top_p": 0.9}):
        sample(logits, **spec)  # type: ignore[arg-type]
        assert torch.equal(logits, before)
    spoiled = before.clone()
    spoiled[0] = torch.nan
    sample(spoiled)
    assert spoiled[0].isnan().all()


def test_memory_of_a_call_in_inference_mode_serves_a_later_one_outside() -> None:
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).bfloat16()

    def calls() -> list[torch.Tensor]:
        with torch.inference_mode():
            first = sample(logits, temperature=0.7, top_p=0.9)
        return [first.token, sample(logits, temperature=0.7, top_p=0.9).token]

    with ThreadPoolExecutor(1) as fresh:  # a thread begins with no memory
        first, second = fresh.submit(calls).result(timeout=60)
    assert torch.equal(first, second)

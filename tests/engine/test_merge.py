"""MERGE reads the best pairs that the definition gives, row by row in float64, from log-probs that are processed as such."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from support.sampling import SLOTS, VOCAB, opened, random_batch, read_probe

from pagefork.sampler import Sampler
from pagefork.scheduler.plan import Kind, Probe, Reads, Spec, ints

pytestmark = pytest.mark.usefixtures("read_by")

GROUPS = (0, 1, 5, 5, 13, SLOTS)  # one of them is empty


def merge(
    sampler: Sampler, logits: torch.Tensor, position: list[int], bias: np.ndarray, n: int, groups: tuple[int, ...] = GROUPS
) -> Reads:
    count = len(bias)
    asked = Probe(Kind.MERGE, ints(range(count)), ints(range(count)), n, groups=ints(groups), bias=bias.astype(np.float32))
    return read_probe(sampler, logits, asked, position)


def expected_pairs(values: np.ndarray, bias: np.ndarray, n: int) -> list[tuple[int, int]]:
    """Of one group: the best pairs by the score rounded to fp32, ties to the lower row, then the lower token."""
    scores = (bias[:, None].astype(np.float32) + values.astype(np.float32)).ravel()
    order = np.argsort(-scores, kind="stable")[:n]
    return [divmod(int(i), VOCAB) for i in order if scores[i] > -np.inf]


def processed(logits: np.ndarray, history: list[int], spec: dict[str, Any]) -> np.ndarray:
    return book.adjusted(book.log_softmax(logits).astype(np.float32), history, spec["prompt_len"], spec)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 10**9])
def test_pairs_are_the_best_of_their_group(seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagefork.kernels.scratch.CHUNK", chunk)
    specs, histories, logits = random_batch(SLOTS, 300 + seed)
    position = [len(history) - 1 for history in histories]
    bias = np.random.default_rng(seed).normal(size=SLOTS).astype(np.float32) * 2 - 5
    found = merge(opened([Spec(**spec) for spec in specs], histories), logits, position, bias, 7)
    assert found.parent is not None and found.top_id is not None and found.score is not None
    assert found.top_logp is not None and found.top_rank is not None and not found.bad.any()
    raw = [book.log_softmax(row.numpy()) for row in logits]
    values = np.stack([processed(row.numpy(), *given) for row, *given in zip(logits, histories, specs, strict=True)])
    for group, (begin, end) in enumerate(itertools.pairwise(GROUPS)):
        best = expected_pairs(values[begin:end], bias[begin:end], 7)
        assert (found.parent[group, len(best) :] == -1).all() and (found.top_id[group, len(best) :] == -1).all()
        assert (found.score[group, len(best) :] == -np.inf).all() and (found.top_logp[group, len(best) :] == -np.inf).all()
        for i, (row, token) in enumerate(best):
            at = begin + row
            assert (found.parent[group, i], found.top_id[group, i]) == (at, token)
            assert abs(found.score[group, i] - (values[at, token] + bias[at])) < 2e-5
            reported = values[at] if specs[at]["processed"] else raw[at]
            assert abs(found.top_logp[group, i] - reported[token]) < 2e-5
            assert found.top_rank[group, i] == ((logits[at] > logits[at, token]).sum() + 1 if specs[at]["rank"] else 0)


def test_nothing_depends_on_the_cut_nor_on_the_other_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    specs, histories, logits = random_batch(SLOTS, 5)
    logits[::2] = logits[::2].round()  # ties
    position = [len(history) - 1 for history in histories]
    built = [Spec(**spec) for spec in specs]
    bias = np.zeros(SLOTS, np.float32)
    whole = merge(opened(built, histories), logits, position, bias, 20)
    for rows in (1, 2, 3, 7, 25):
        monkeypatch.setattr("pagefork.kernels.scratch.CHUNK", rows * VOCAB)
        cut = merge(opened(built, histories), logits, position, bias, 20)
        for name in ("parent", "top_id", "score", "top_logp", "top_rank"):
            assert (getattr(cut, name) == getattr(whole, name)).all(), (rows, name)
    begin, end = GROUPS[3], GROUPS[4]
    alone = merge(
        opened(built[begin:end], histories[begin:end]), logits[begin:end], position[begin:end], bias[begin:end], 20, (0, 8)
    )
    assert alone.parent is not None and whole.parent is not None
    assert (alone.parent[0] + begin == whole.parent[3]).all()
    assert (alone.score == whole.score[3]).all() and (alone.top_id == whole.top_id[3]).all()  # type: ignore[index]


def test_a_broken_row_is_bad_and_the_rest_of_its_group_is_read() -> None:
    _, _, logits = random_batch(6, 1)
    logits[1, 3] = torch.nan
    logits[4] = -torch.inf
    sampler = opened([Spec(prompt_len=1)] * 6, [[]] * 6)
    found = merge(sampler, logits, [0] * 6, np.zeros(6, np.float32), 5, (0, 3, 6))
    assert found.bad.tolist() == [False, True, False, False, True, False] and found.why == {}
    assert found.parent is not None
    assert set(found.parent[0]) <= {0, 2} and set(found.parent[1]) <= {3, 5}


def test_entries_that_processing_left_nothing_of_give_no_pairs() -> None:
    banned = Spec(prompt_len=1, rank=True, logit_bias=tuple((token, -np.inf) for token in range(VOCAB)))
    sampler = opened([Spec(prompt_len=1), banned, banned, banned], [[]] * 4)
    found = merge(sampler, torch.zeros(4, VOCAB), [0] * 4, np.zeros(4, np.float32), 3, (0, 2, 4))
    assert not found.bad.any() and not found.why
    assert found.parent is not None and found.parent.tolist() == [[0, 0, 0], [-1, -1, -1]]


def test_processors_see_log_probs_once_and_a_top_of_the_same_rows_the_model() -> None:
    calls: list[torch.Tensor] = []

    def halve(prompt: list[int], output: list[int], values: torch.Tensor) -> torch.Tensor:
        calls.append(values.clone())
        return values / 2

    _, _, logits = random_batch(3, 2)
    history = [[4, 5], [4, 6], [4, 7]]
    sampler = opened([Spec(prompt_len=1, processors=1)] * 3, history)
    sampler.processors.register(1, 1, [halve])
    top = Probe(Kind.TOPN, ints(range(3)), ints(range(3)), 4)
    for order in ((Kind.TOPN, Kind.MERGE), (Kind.MERGE, Kind.TOPN)):
        calls.clear()
        for kind in order:
            if kind is Kind.TOPN:
                read = read_probe(sampler, logits, top, [1] * 3)
            else:
                found = merge(sampler, logits, [1] * 3, np.zeros(3, np.float32), 4, (0, 3))
        torch.testing.assert_close(torch.stack(calls), logits.log_softmax(-1))
        values = logits.log_softmax(-1).numpy() / 2
        assert found.parent is not None and found.top_id is not None and read.top_logp is not None
        pairs = list(zip(found.parent[0].tolist(), found.top_id[0].tolist(), strict=True))
        assert pairs == expected_pairs(values, np.zeros(3), 4)
        np.testing.assert_allclose(read.top_logp, logits.log_softmax(-1).topk(4).values.numpy(), atol=1e-5)
        sampler.end_step()


def test_a_processor_that_fails_on_one_sequence_makes_its_search_bad() -> None:
    def fail(prompt: list[int], output: list[int], values: torch.Tensor) -> torch.Tensor:
        if output == [6]:
            raise RuntimeError("no")
        return values

    sampler = opened([Spec(prompt_len=1, processors=1)] * 2 + [Spec(prompt_len=1)], [[4, 5], [4, 6], []])
    sampler.processors.register(1, 1, [fail])
    found = merge(sampler, torch.zeros(3, VOCAB), [1] * 3, np.zeros(3, np.float32), 2, (0, 2, 3))
    assert found.bad.tolist() == [True, True, False]
    assert "RuntimeError: no" in found.why[1]


def test_a_top_of_processed_rows_does_not_call_the_processors_of_others() -> None:
    """In one probe: a sampled sequence that reports processed log-probs, and a searched one with processors."""
    calls = []

    def note(prompt: list[int], output: list[int], values: torch.Tensor) -> torch.Tensor:
        calls.append(float(values.double().exp().sum()))
        return values

    sampler = opened([Spec(prompt_len=1, processed=True, logit_bias=((3, 2.0),)), Spec(prompt_len=1, processors=1)], [[], [4]])
    sampler.processors.register(1, 1, [note])
    logits = torch.ones(2, VOCAB)
    top = Probe(Kind.TOPN, ints([0, 1]), ints([0, 1]), 2)
    read_probe(sampler, logits, top, [0, 0])
    assert not calls
    merge(sampler, logits, [0, 0], np.zeros(2, np.float32), 2, (0, 1, 2))
    assert np.allclose(calls, [1.0])

"""What the benchmarks of the kernels time is what they say: ours and the peers compute the same, at a small size."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[3] / "benchmarks/kernels")]

VOCAB = 300


class OneBuffer:
    """Stands for `common.Device`."""

    def __init__(self, device: torch.device) -> None:
        self.name = device

    def copies(self, size: int) -> int:
        return 1


def outcomes(op: str, shape: dict[str, Any], device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Ours, and those of the peers."""
    work = import_module(op).prepare(shape, OneBuffer(device))
    [ours] = [call() for call in work.calls]
    return ours, {name: calls[0]() for name, calls in work.peers.items()}


@pytest.mark.parametrize("case", ["greedy", "unfiltered", "top-p peaked", "top-p flat", "full peaked", "full flat"])
def test_draws(case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("sample"), "SEEN", 50)
    ours, peers = outcomes("sample", {"B": 2, "V": VOCAB, "case": case}, device)
    assert not ours.bad.any() and (ours.logprob <= 0).all()
    if case == "greedy":
        assert torch.equal(ours.token, peers["torch argmax"])
    for tokens in peers.values():
        assert tokens.shape[0] == 2 and tokens.max() < VOCAB
    assert ours.token.max() < VOCAB


@pytest.mark.parametrize("case", ["top 20", "top 20, rank"])
def test_best_tokens(case: str, device: torch.device) -> None:
    (_, logprobs, rank), peers = outcomes("top_logprobs", {"B": 2, "V": VOCAB, "case": case}, device)
    best, torch_rank = peers["torch log_softmax, topk"]
    torch.testing.assert_close(logprobs, best.values, atol=2e-5, rtol=0)
    assert (rank is None) == (case == "top 20") and (rank is None or torch.equal(rank[:, 0], torch_rank))


@pytest.mark.parametrize(("searches", "width"), [(2, 3), (1, 5)])
def test_merges(searches: int, width: int, device: torch.device) -> None:
    merged, peers = outcomes("beam_merge", {"G": searches, "K": width, "V": VOCAB}, device)
    best = peers["torch log_softmax, topk"]
    torch.testing.assert_close(merged.score, best.values, atol=2e-5, rtol=0)  # the order of ties is its own there

"""The best pairs of every group, exactly ordered: by score, ties to the lower row, then the lower token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pagefork.kernels.beam_merge import Merge, Merged, beam_merge
from pagefork.kernels.distribution import Distribution
from pagefork.kernels.scratch import Scratch, widened

pytestmark = pytest.mark.usefixtures("read_by")


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def table(rows: int, vocab: int, kind: str) -> Tensor:
    """Log-probs: usual ones, few values, mostly impossible, or all equal."""
    logprobs = numbers(rows, vocab)
    if kind == "ties":
        logprobs = logprobs.round()
    elif kind == "sparse":
        logprobs[logprobs < 1.6] = -torch.inf
    elif kind == "constant":
        logprobs.zero_()
    return logprobs


def check(found: Merged, logprobs: Tensor, bias: Tensor, offsets: Sequence[int], n: int) -> None:
    """Against a stable sort of all pairs of each group."""
    vocab = logprobs.shape[1]
    assert found.score.shape == (len(offsets) - 1, n)
    for group, (begin, end) in enumerate(itertools.pairwise(offsets)):
        scores = (logprobs[begin:end].numpy() + bias[begin:end, None].numpy()).ravel()
        order = np.argsort(-scores, kind="stable")[:n]
        order = order[scores[order] > -np.inf]
        count = len(order)
        assert (found.parent[group, :count].numpy() == begin + order // vocab).all()
        assert (found.token[group, :count].numpy() == order % vocab).all()
        assert (found.score[group, :count].numpy() == scores[order]).all()
        assert (found.logprob[group, :count].numpy() == logprobs[begin:end].numpy().ravel()[order]).all()
        assert (found.parent[group, count:] == -1).all() and (found.token[group, count:] == -1).all()
        assert (found.score[group, count:] == -torch.inf).all() and (found.logprob[group, count:] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["usual", "ties", "sparse", "constant"])
@pytest.mark.parametrize("vocab", [1, 5, 64, 65, 331])
def test_pairs_are_those_of_a_stable_sort_whatever_the_cut(vocab: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of many sizes, empty ones, one of more rows than fit in a slice."""
    sizes = [3, 0, 1, 4, 4, 23, 0, 2]
    offsets = [0, *itertools.accumulate(sizes)]
    logprobs, bias = table(offsets[-1], vocab, kind), numbers(offsets[-1]).round()
    bias[4] = -torch.inf
    for rows, n in itertools.product((1, 2, 5, 1000), (1, 4, 70)):
        monkeypatch.setattr("pagefork.kernels.scratch.CHUNK", rows * vocab)
        check(beam_merge(logprobs, bias, offsets, n), logprobs, bias, offsets, n)


def test_one_wide_group_is_ordered_over_all_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagefork.kernels.scratch.CHUNK", 100 * 333)
    logprobs, bias = table(1000, 333, "usual").log_softmax(-1), numbers(1000)
    check(beam_merge(logprobs, bias, [0, 1000], 2000), logprobs, bias, [0, 1000], 2000)
    check(beam_merge(logprobs.round(), bias.round(), [0, 1000], 2000), logprobs.round(), bias.round(), [0, 1000], 2000)


def test_logits_with_their_scale_give_the_pairs_of_their_log_probs() -> None:
    """Scores that differ by less than fp32 can tell tie in both."""
    logits = numbers(6, 500)
    logits[2] = 1000 + logits[2] * 1e-3
    logits[3] *= 1e-7
    bias = torch.tensor([0.0, -1.0, 2.0, 3.0, 0.0, 0.0])
    wide, merge = widened(logits, Scratch()), Merge([0, 4, 6], 6, 40, torch.device("cpu"))
    scale = Distribution(wide, None, Scratch()).scale()
    merge.add(wide, bias, scale)
    check(merge.result(), scale.log_probs(logits), bias, [0, 4, 6], 40)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_row_is_passed_over(broken: float) -> None:
    logprobs, bias = table(4, 70, "usual"), torch.zeros(4)
    spoiled, gone = logprobs.clone(), logprobs.clone()
    spoiled[1, 66], gone[1] = broken, -torch.inf
    check(beam_merge(spoiled, bias, [0, 2, 4], 100), gone, bias, [0, 2, 4], 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_fp32_sums_of_any_log_probs(dtype: torch.dtype) -> None:
    logprobs, bias = table(5, 200, "usual").to(dtype), numbers(5)
    check(beam_merge(logprobs, bias, [0, 5], 30), logprobs.float(), bias, [0, 5], 30)


def test_what_makes_no_sense_is_refused() -> None:
    logprobs, bias = torch.zeros(3, 5), torch.zeros(3)
    with pytest.raises(ValueError, match="n=0 is refused"):
        beam_merge(logprobs, bias, [0, 3], 0)
    for offsets in ([], [0], [0, 2], [1, 3], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="offsets must ascend from 0 to 3"):
            beam_merge(logprobs, bias, offsets, 2)
    for wrong in (bias[:2], bias.double(), torch.tensor([0, 1, torch.nan]), torch.tensor([0, 1, torch.inf])):
        with pytest.raises(ValueError, match=r"bias must be float32 \[3\]"):
            beam_merge(logprobs, wrong, [0, 3], 2)

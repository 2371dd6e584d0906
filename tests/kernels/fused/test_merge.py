"""The best pairs of every search are those of a stable sort of all its pairs, whichever way they are found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.group_rows import ADJUSTED_FLAGS, entries, marked_table, rows
from torch import Tensor

from pagefork.kernels import merge_rows as module
from pagefork.kernels.adjusted import adjusted_rows
from pagefork.kernels.adjusted_stats import adjust_stats
from pagefork.kernels.beam_merge import beam_merge
from pagefork.kernels.group_stats import group_stats
from pagefork.kernels.merge_rows import Merged, merge_rows
from pagefork.kernels.scales import model_scale, own_scale
from pagefork.kernels.token_table import TokenTable


def check(found: Merged, logprobs: Tensor, bias: Tensor, offsets: Sequence[int], n: int) -> None:
    """Against numpy's sort of the pairs of each search. logprobs: fp32 [P, V] and bias [P], on the CPU."""
    vocab = logprobs.shape[1]
    assert found.score.shape == (len(offsets) - 1, n)
    for search, (begin, end) in enumerate(itertools.pairwise(offsets)):
        scores = (logprobs[begin:end] + bias[begin:end, None]).numpy().ravel()
        order = np.argsort(-scores, kind="stable")[:n]
        order = order[scores[order] > -np.inf]
        given = begin + order // vocab, order % vocab, scores[order], logprobs[begin:end].numpy().ravel()[order]
        for field, expected, missing in zip(found, given, (-1, -1, -np.inf, -np.inf), strict=True):
            values = field[search].cpu().numpy()
            assert (values[: len(order)] == expected).all() and (values[len(order) :] == missing).all()


def numbers(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).round()


@pytest.fixture(params=["narrow", "wide"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways must find the same."""
    if request.param == "wide":
        monkeypatch.setattr(module, "MERGED_AT_ONCE", 0)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("vocab", "n"), [(1, 3), (64, 128), (65, 1), (999, 20)])
def test_pairs_are_those_of_a_stable_sort(vocab: int, n: int, device: torch.device) -> None:
    """Searches of many sizes, empty ones; ties everywhere; rows that are impossible."""
    offsets = [0, 0, 1, 5, 5, 14]
    logprobs = torch.cat((rows(vocab, torch.bfloat16, device), rows(vocab, torch.bfloat16, device).round()))
    bias = numbers(14)
    bias[4] = -torch.inf
    logprobs[7, 0], logprobs[8, 0] = torch.nan, torch.inf
    expected = logprobs.float().cpu()
    expected[7:9] = -torch.inf
    check(beam_merge(logprobs, bias.to(device), offsets, n), expected, bias, offsets, n)


@pytest.mark.parametrize("n", [129, 300])
def test_more_pairs_than_one_program_holds(n: int, device: torch.device) -> None:
    logprobs, bias = rows(200, torch.float32, device), numbers(7)
    for offsets in ([0, 7], [0, 1, 4, 7]):
        check(beam_merge(logprobs, bias.to(device), offsets, n), logprobs.float().cpu(), bias, offsets, n)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("processed", [False, True])
def test_bans_bias_and_penalties_count(processed: bool, device: torch.device) -> None:
    """They apply to the model's log-probs, or to logits that are then normalised; untouched entries stand beside."""
    vocab, offsets, n = 300, [0, 3, 4, 7], 12
    logits = rows(vocab, torch.float32, device)
    logits[6] = logits[0].round()
    given, table = entries([0, 1, 4, 3, 0, 5, 6], ADJUSTED_FLAGS, device), marked_table(7, vocab, device)
    bias = numbers(7)
    stats = group_stats(logits, given, True)
    model = model_scale(stats)
    adjust_stats(stats, logits, given, table, log_probs=None if processed else model)
    on_cpu, raw = TokenTable(*(field.cpu() for field in table)), logits[given[:, 0].long()]
    if processed:
        values = adjusted_rows(raw.cpu(), given.cpu(), on_cpu)
        scale = own_scale(stats, given)
        logprobs = scale.log_probs(values.to(device)).cpu()
        mass = logprobs.double().exp().sum(-1)
        assert ((mass - 1).abs() < 1e-5).logical_or(scale.bad.cpu()).all()
        logprobs[scale.bad.cpu()] = -torch.inf
    else:
        logprobs = adjusted_rows(model.log_probs(raw).cpu(), given.cpu(), on_cpu)
    found = merge_rows(logits, given, stats, table, bias.to(device), offsets, n, processed=processed)
    check(found, logprobs, bias, offsets, n)


def test_no_search_notices_another(device: torch.device) -> None:
    logits, bias = rows(999, torch.bfloat16, device), numbers(7).to(device)
    given = entries(range(7), [0] * 7, device)
    together = merge_rows(logits, given, group_stats(logits, given, False), None, bias, [0, 3, 4, 7], 9, processed=False)
    for search, (begin, end) in enumerate(((0, 3), (3, 4), (4, 7))):
        part = given[begin:end]
        stats = group_stats(logits, part, False)
        alone = merge_rows(logits, part, stats, None, bias[begin:end], [0, end - begin], 9, processed=False)
        for name, one, many in zip(Merged._fields, alone, together, strict=True):
            shift = begin * (one >= 0) if name == "parent" else 0
            assert torch.equal(one[0] + (shift[0] if name == "parent" else 0), many[search])


def test_what_makes_no_sense_is_refused(device: torch.device) -> None:
    logits, given, bias = torch.zeros(3, 5, device=device), entries(range(3), [0] * 3, device), torch.zeros(3, device=device)
    stats = group_stats(logits, given, False)
    with pytest.raises(ValueError, match="n=0 is refused"):
        merge_rows(logits, given, stats, None, bias, [0, 3], 0, processed=False)
    with pytest.raises(ValueError, match="offsets must ascend from 0 to 3"):
        merge_rows(logits, given, stats, None, bias, [0, 2], 1, processed=False)
    with pytest.raises(ValueError, match=r"bias must be float32 \[3\]"):
        merge_rows(logits, given, stats, None, bias[:2], [0, 3], 1, processed=False)

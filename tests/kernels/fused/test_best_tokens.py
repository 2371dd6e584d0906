"""The n best tokens of an entry are those of a stable sort of its whole row, adjusted or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.group_rows import ADJUSTED_FLAGS, entries, marked_table, rows
from torch import Tensor

from pagefork.kernels import top_logprobs
from pagefork.kernels.adjusted import adjusted_rows
from pagefork.kernels.adjusted_stats import adjust_stats
from pagefork.kernels.best_tokens import best_tokens
from pagefork.kernels.group_stats import group_stats
from pagefork.kernels.token_table import TokenTable


def check(found: tuple[Tensor, Tensor], values: Tensor, n: int, floor: Tensor | None = None) -> None:
    """Against numpy's sort of rows [P, V]."""
    for p, x in enumerate(values.cpu().numpy()):
        order = np.lexsort((np.arange(len(x)), -x))[:n]
        order = order[(x[order] > -np.inf) & (x[order] >= (-np.inf if floor is None else float(floor[p])))]
        ids, best = (field[p].cpu().numpy() for field in found)
        assert (ids[: len(order)] == order).all() and (best[: len(order)] == x[order]).all()
        assert (ids[len(order) :] == -1).all() and (best[len(order) :] == -np.inf).all()


def on_cpu(table: TokenTable) -> TokenTable:
    return TokenTable(*(field.cpu() for field in table))


@pytest.mark.parametrize(("vocab", "n"), [(1, 2), (2, 1), (63, 20), (64, 64), (65, 65), (999, 1), (999, 20), (4097, 128)])
def test_order_is_by_value_then_id(vocab: int, n: int, device: torch.device) -> None:
    for dtype, which in ((torch.float32, [6, 0, 2, 3, 5]), (torch.bfloat16, [4, 1, 3]), (torch.float16, [0])):
        logits, given = rows(vocab, dtype, device), entries(which, [0] * len(which), device)
        check(best_tokens(logits, given, group_stats(logits, given, False), None, n), logits.float()[which], n)


@pytest.mark.parametrize(("vocab", "n"), [(65, 128), (999, 5)])
def test_entries_of_own_values_stand_beside_raw_ones(vocab: int, n: int, device: torch.device) -> None:
    """Bans, bias and penalties count where asked for, and a floor only there."""
    logits = rows(vocab, torch.bfloat16, device)
    logits[5] = logits[0]
    given, table = entries([0, 1, 1, 3, 4, 5, 0], ADJUSTED_FLAGS, device), marked_table(7, vocab, device)
    stats = group_stats(logits, given, True)
    adjust_stats(stats, logits, given, table)
    raw = logits.float()[given[:, 0].long()].cpu()
    adjusted = adjusted_rows(raw, given.cpu(), on_cpu(table))
    check(best_tokens(logits, given, stats, table, n), raw, n)
    asked = torch.tensor([True, True, True, True, True, False, True])
    own = torch.where(asked[:, None], adjusted, raw)
    check(best_tokens(logits, given, stats, table, n, None, asked.to(device)), own, n)
    floor = own.masked_fill(own == -torch.inf, 0.0).mean(-1)
    found = best_tokens(logits, given, stats, table, n, floor.to(device), asked.to(device))
    check(found, own, n, torch.where(asked, floor, -torch.inf))


def test_impossible_tokens_are_listed_where_asked_for(device: torch.device) -> None:
    logits = rows(70, torch.float32, device)
    given = entries(range(7), [0] * 7, device)
    ids, values = best_tokens(logits, given, group_stats(logits, given, False), None, 100, impossible=True)
    for x, found, value in zip(logits.cpu().numpy(), ids.cpu().numpy(), values.cpu().numpy(), strict=True):
        order = np.lexsort((np.arange(70), -x))
        assert (found[:70] == order).all() and (value[:70] == x[order]).all() and (found[70:] == -1).all()


def test_no_entry_notices_another(device: torch.device) -> None:
    """Neither the number of entries, nor their order, nor rows that are bad change a bit."""
    logits = rows(4097, torch.bfloat16, device)
    spoiled = logits.clone()
    spoiled[5], spoiled[6, 70] = torch.nan, torch.inf
    given = entries(range(7), [0] * 7, device)
    together = best_tokens(logits, given, group_stats(logits, given, False), None, 20)
    order = [3, 6, 0, 5, 4, 1, 2]
    shuffled = given[torch.tensor(order, device=device)]
    mixed = best_tokens(spoiled, shuffled, group_stats(spoiled, shuffled, False), None, 20)
    for place, p in enumerate(order):
        if p < 5:
            alone = best_tokens(logits, given[p : p + 1], group_stats(logits, given[p : p + 1], False), None, 20)
            for one, many, other in zip(alone, together, mixed, strict=True):
                assert torch.equal(one[0], many[p]) and torch.equal(one[0], other[place])


def test_log_probs_of_the_best_are_those_of_float64(device: torch.device) -> None:
    logits = rows(999, torch.bfloat16, device)[:5]
    ids, logprobs = top_logprobs(logits, 30)
    order = logits.cpu().float().sort(dim=-1, descending=True, stable=True).indices[:, :30]
    expected = logits.cpu().double().log_softmax(-1).gather(-1, order)
    assert torch.equal(ids.cpu(), order)
    assert ((logprobs.cpu() - expected).abs() < 2e-5).logical_or(expected == -torch.inf).all()


def test_what_makes_no_sense_is_refused(device: torch.device) -> None:
    logits, given = torch.zeros(2, 5, device=device), entries([0, 1], [0, 0], device)
    stats = group_stats(logits, given, False)
    for n in (0, 129):
        with pytest.raises(ValueError, match=f"n={n} is refused"):
            best_tokens(logits, given, stats, None, n)
    with pytest.raises(ValueError, match=r"own must be contiguous bool \[2\]"):
        best_tokens(logits, given, stats, None, 3, None, torch.ones(2, device=device))
    with pytest.raises(ValueError, match="come with own"):
        best_tokens(logits, given, stats, None, 3, torch.zeros(2, device=device))
    with pytest.raises(ValueError, match="stats of"):
        best_tokens(logits, given[:1], stats, None, 3)

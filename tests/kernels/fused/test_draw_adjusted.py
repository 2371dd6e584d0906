"""Draws of entries with bans, bias and penalties are those of the torch pipeline on logits that are adjusted beforehand."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.draws import cases, entries, same
from torch import Tensor

from pagefork.kernels import draw as module
from pagefork.kernels import sample
from pagefork.kernels._triton import INTERPRETED
from pagefork.kernels.adjusted import adjusted_rows
from pagefork.kernels.adjusted_stats import adjust_stats
from pagefork.kernels.draw import Draws, draw
from pagefork.kernels.entries import ENTRY, Entry
from pagefork.kernels.group_stats import group_stats
from pagefork.kernels.token_cells import State
from pagefork.kernels.token_table import TokenTable, mark, new_table


def crowd(vocab: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, TokenTable, dict[str, Any]]:
    """Rows, entries with limits and penalties of every kind, every fourth without a table, and the table."""
    rng = np.random.default_rng(vocab)
    logits, params = cases(vocab, count, vocab + 1)
    given = entries(params, torch.device("cpu"))
    records = given.numpy().view(ENTRY)[:, 0]
    adjusted = np.arange(count) % 4 != 3
    only = adjusted & (np.arange(count) % 7 == 0)
    records["flags"] |= np.where(adjusted, int(Entry.OWN | Entry.ADJUSTED | Entry.COUNTED), 0).astype(np.int32)
    records["flags"] |= np.where(only, int(Entry.ONLY), 0).astype(np.int32)
    records["slot"] = rng.permutation(count)
    records["repetition"], records["frequency"] = rng.choice([1.0, 1.3], count), rng.choice([0.0, 0.5], count)
    table = new_table(count, 256, vocab, device)
    size = 30
    slot = np.repeat(records["slot"], size)
    token = np.concatenate([rng.permutation(max(vocab, size))[:size] % vocab for _ in range(count)])
    state = rng.choice([0, 1, State.PROMPT, State.PROMPT + 2, State.BANNED], len(slot), p=[0.2, 0.3, 0.2, 0.2, 0.1])
    state = np.where(np.arange(len(slot)) % size < 5, 1, state) | State.ALLOWED
    bias = rng.choice([0.0, 2.5, -1.5], len(slot))
    given_marks = zip((slot, token, state, bias), (np.int32, np.int32, np.int32, np.float32), strict=True)
    mark(table, *(torch.from_numpy(values.astype(kind)).to(device) for values, kind in given_marks))
    return logits, given.to(device), table, params


def run(logits: Tensor, given: Tensor, table: TokenTable) -> Draws:
    stats = group_stats(logits, given, True)
    adjust_stats(stats, logits, given, table)
    return draw(logits, given, stats, table, filtered=True)


@pytest.mark.parametrize(("vocab", "count"), [(130, 16), (700, 8)] if INTERPRETED else [(130, 256), (2500, 256), (128_256, 256)])
def test_tokens_are_those_of_the_torch_pipeline(
    vocab: int, count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, given, table, params = crowd(vocab, count, device)
    found = run(logits.to(device), given, table)
    dense = adjusted_rows(logits, given.cpu(), TokenTable(*(part.cpu() for part in table)))
    assert not torch.equal(dense, logits)
    monkeypatch.setattr(sys.modules["pagefork.kernels.sample"], "fused", lambda x: False)
    expected = sample(dense, **{name: torch.from_numpy(values) for name, values in params.items()})  # type: ignore[arg-type]
    assert torch.equal(found.bad.cpu(), expected.bad)
    assert torch.equal(found.token.cpu(), expected.token)
    assert (found.logprob.cpu() - expected.logprob)[~expected.bad].abs().max() < 2e-5


def test_both_ways_to_find_limits_give_the_same_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, given, table, _ = crowd(1300, 6, device)
    few = run(logits.to(device), given, table)
    monkeypatch.setattr(module, "CANDIDATES", 1)
    assert same(run(logits.to(device), given, table), few)

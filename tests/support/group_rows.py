"""Entries over rows of many kinds, for tests of the kernels that read records of groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pagefork.kernels.entries import ENTRY, Entry
from pagefork.kernels.token_cells import State
from pagefork.kernels.token_table import TokenTable, mark, new_table


def rows(vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Seven rows: usual ones, rows full of ties and of -inf, one of zeros of either sign, one all but empty, a huge one.

    They don't lie together.
    """
    wide = torch.randn(7, vocab + 3, generator=torch.Generator().manual_seed(vocab)).to(device)
    wide[1] = (wide[1] * 2).round()
    wide[2] = wide[2].sign() * 0.0
    wide[3, torch.arange(vocab + 3) % 5 > 1] = -torch.inf
    wide[4] = (wide[4] * 40).bfloat16()
    wide[5, : vocab // 2 + 1] = -torch.inf
    wide[5, vocab // 2 + 2 :] = -torch.inf
    wide[6] *= 1e4
    return wide.to(dtype)[:, 1 : vocab + 1]


def entries(row: Sequence[int], flags: Sequence[int], device: torch.device) -> Tensor:
    """int32 [P, WORDS]: entry p reads row[p], and its slot is p; penalties are on where it is COUNTED."""
    records = np.zeros(len(row), ENTRY)
    records["row"], records["flags"], records["slot"] = row, flags, np.arange(len(row))
    records["temperature"], records["position"] = 1.0, 50
    records["repetition"], records["frequency"], records["presence"] = 1.5, 0.5, 0.25
    return torch.from_numpy(records.view(np.int32).reshape(len(row), -1)).to(device)


def marked_table(slots: int, vocab: int, device: torch.device) -> TokenTable:
    """In every slot some tokens that occurred, that are banned, allowed, end tokens or biased."""
    rng = np.random.default_rng(vocab)
    token = np.concatenate([rng.choice(vocab, min(vocab, 20), replace=False) for _ in range(slots)])
    count = len(token)
    state = rng.choice([1, State.PROMPT, State.BANNED, State.ALLOWED, State.END, State.ALLOWED | 2], count)
    table = new_table(slots, 64, vocab, device)
    columns = np.arange(slots).repeat(count // slots), token, state, rng.normal(0, 3, count), rng.choice([-1, 50], count)
    types = torch.int32, torch.int64, torch.int32, torch.float32, torch.int32
    mark(table, *(torch.from_numpy(column).to(device, kind) for column, kind in zip(columns, types, strict=True)))
    return table


ADJUSTED_FLAGS = [
    int(flags)
    for flags in (
        Entry.OWN | Entry.ADJUSTED,
        Entry(0),
        Entry.OWN | Entry.ADJUSTED | Entry.ONLY,
        Entry.OWN,
        Entry.OWN | Entry.ADJUSTED | Entry.COUNTED,
        Entry.OWN | Entry.ADJUSTED | Entry.NO_END | Entry.COUNTED,
        Entry.OWN | Entry.ADJUSTED | Entry.ONLY | Entry.COUNTED,
    )
]

"""What kernels that read given tokens or groups of entries share: the check of their arguments, and whose values are read."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, need_kernels, tl
from .adjusted import group_values, values_of
from .entries import FLAGS, OWN, WORDS, check_entries, entry_int
from .group_stats import GroupStats
from .scratch import GROUP
from .token_table import TokenTable


def check_reading(logits: Tensor, entries: Tensor, stats: GroupStats | None, own: Tensor | None) -> None:
    """Raises ValueError unless logits, entries, their records and marks bool [P] go together, on a device that runs kernels."""
    check_entries(entries, logits)
    need_kernels(logits)
    count = len(entries)
    if logits.stride(1) != 1:
        raise ValueError("logits must lie together row by row")
    if own is not None and (own.shape != (count,) or own.dtype != torch.bool or not own.is_contiguous()):
        raise ValueError(f"own must be contiguous bool [{count}], not {own.dtype} {list(own.shape)}")
    if stats is not None and (stats.top.shape[1:] != (count, -(-logits.shape[1] // GROUP)) or not stats.top.is_contiguous()):
        raise ValueError(
            f"stats of {list(stats.top.shape)} are not contiguous records of {count} entries of {logits.shape[1]} tokens"
        )


def plain_entries(count: int, device: torch.device) -> Tensor:
    """Entries that say nothing but which row they are of: all rows, in order."""
    entries = torch.zeros(count, WORDS, dtype=torch.int32, device=device)
    entries[:, 0] = torch.arange(count, device=device)
    return entries


def table_parts(table: TokenTable | None, unused: Tensor) -> tuple[Tensor, Tensor, int]:
    """Cells, bits and capacity, as kernels take them; without a table `unused` stands for what is not read."""
    return (unused, unused, 1) if table is None else (table.cells, table.bits, table.cells.shape[1])


@jit
def reads_own(entry: tl.tensor, own: tl.tensor, index: tl.tensor, HAS_OWN: tl.constexpr) -> tl.tensor:
    """Whether an entry is read by values of its own, bool. own: pointer to the marks."""
    asked = tl.full([], 0, tl.int1)
    if HAS_OWN:
        asked = tl.load(own + index).to(tl.int1) & ((entry_int(entry, FLAGS) & OWN) != 0)
    return asked


@jit
def read_groups(
    row: tl.tensor,
    group: tl.tensor,
    valid: tl.tensor,
    vocab: tl.tensor,
    entry: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    own: tl.tensor,
    ADJUST: tl.constexpr,
) -> tl.tensor:
    """As `group_values`: adjusted where the entry is read by its own values (`own`, bool), else the model's."""
    if not ADJUST:
        x = group_values(row, group, valid, vocab, entry, cells, bits, capacity, 0.0, 0.0, False, False)
    elif own:
        x = group_values(row, group, valid, vocab, entry, cells, bits, capacity, 0.0, 0.0, True, False)
    else:
        x = group_values(row, group, valid, vocab, entry, cells, bits, capacity, 0.0, 0.0, False, False)
    return x


@jit
def read_tokens(
    row: tl.tensor,
    token: tl.tensor,
    vocab: tl.tensor,
    entry: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    own: tl.tensor,
    ADJUST: tl.constexpr,
) -> tl.tensor:
    """As `values_of`: adjusted where the entry is read by its own values (`own`, bool), else the model's."""
    if not ADJUST:
        x = values_of(row, token, vocab, entry, cells, bits, capacity, False)
    elif own:
        x = values_of(row, token, vocab, entry, cells, bits, capacity, True)
    else:
        x = values_of(row, token, vocab, entry, cells, bits, capacity, False)
    return x

"""What `group_values` makes of whole rows, and the entries that specs ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagefork.kernels._triton import constant, jit, launch, tl
from pagefork.kernels.adjusted import group_values
from pagefork.kernels.distribution import Scale
from pagefork.kernels.entries import ENTRY, ENTRY_WORDS, ROW, Entry, entry_int
from pagefork.kernels.scratch import GROUP
from pagefork.kernels.token_table import TokenTable

_GROUP = constant(GROUP)


@jit
def _kernel(
    out: tl.tensor,
    logits: tl.tensor,
    entries: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    top: tl.tensor,
    log_scale: tl.tensor,
    vocab: tl.tensor,
    capacity: tl.tensor,
    LOG_PROBS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    which = tl.program_id(0)
    entry = entries + which * ENTRY_WORDS
    group = tl.arange(0, GROUPS)
    valid = group < tl.cdiv(vocab, _GROUP)
    row = logits + entry_int(entry, ROW) * vocab
    shift, scale = tl.load(top + which), tl.load(log_scale + which)
    y = group_values(row, group, valid, vocab, entry, cells, bits, capacity, shift, scale, True, LOG_PROBS)
    token = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    tl.store(out + which * vocab + token, y, mask=token < vocab)


def values(logits: Tensor, entries: Tensor, table: TokenTable, log_probs: Scale | None = None) -> Tensor:
    """fp32 [P, V]: the adjusted values of all tokens. logits: contiguous [U, V]."""
    vocab = logits.shape[1]
    out = torch.empty(len(entries), vocab, device=logits.device)
    none = torch.zeros(len(entries), device=logits.device)
    scale = (none, none) if log_probs is None else (log_probs.top, log_probs.log_scale)
    constants = {"LOG_PROBS": log_probs is not None, "GROUPS": max(2, 1 << (table.bits.shape[1] - 1).bit_length())}
    launch(_kernel, (len(entries),), out, logits, entries, *table[:2], *scale, vocab, table.cells.shape[1], **constants)
    return out


def entries(
    specs: Sequence[dict[str, Any]], slots: Sequence[int], length: Sequence[int], device: torch.device, rows: Sequence[int] = ()
) -> Tensor:
    """int32 [P, WORDS]: entry p draws the token after the first length[p] ones, from logits rows[p] (p by default)."""
    records = np.zeros(len(specs), ENTRY)
    for p, (spec, slot, record) in enumerate(zip(specs, slots, records, strict=True)):
        penalties = [spec.get(f"{name}_penalty", neutral) for name, neutral in _PENALTIES]
        flags = Entry.OWN | (Entry.ADJUSTED if slot >= 0 else Entry(0))
        flags |= Entry.ONLY if spec.get("allowed_ids") else Entry(0)
        flags |= Entry.NO_END if 0 <= length[p] - spec["prompt_len"] < spec.get("min_tokens", 0) else Entry(0)
        flags |= Entry.COUNTED if penalties != [1.0, 0.0, 0.0] else Entry(0)
        temperature = spec.get("temperature", 0.0) or 1.0
        record["row"], record["flags"], record["temperature"] = (rows or range(len(specs)))[p], flags, temperature
        record["slot"], record["position"] = slot, length[p]
        record["repetition"], record["frequency"], record["presence"] = penalties
    return torch.from_numpy(records.view(np.int32).reshape(len(records), -1)).to(device)


_PENALTIES = (("repetition", 1.0), ("frequency", 0.0), ("presence", 0.0))

"""Records of the groups in which an entry's values are not the model's: what its token table touches.

`group_stats` reads every logit once and knows no table. Of the few groups that a table touches, the records [1] are made
again from the adjusted values.

Where these are many, a pass over the cells of the tables comes first. Of a group whose largest value stays, it replaces
what the tokens add to the mass, which is exact, as masses are integers. Only the groups whose largest value may change are
then made again. The records are the same bits either way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ._triton import Variant, constant, fused, jit, launch, tl
from .adjusted import adjusted_rows, adjusted_values, group_values
from .distribution import Scale
from .entries import (
    ADJUSTED,
    ENTRY,
    ENTRY_WORDS,
    FLAGS,
    ONLY,
    ROW,
    SLOT,
    TEMPERATURE,
    Entry,
    check_entries,
    entry_float,
    entry_int,
)
from .group_stats import GroupStats, group_mass, group_stats, token_mass
from .scratch import GROUP
from .token_cells import CELL
from .token_table import TokenTable

TILE = 4  # groups per program of one warp
BLOCK = 128  # cells per program
DIRECT = 1 << 14  # up to so many groups are made again without a pass over the cells
_GROUP = constant(GROUP)


def adjust_stats(
    stats: GroupStats,
    logits: Tensor,
    entries: Tensor,
    table: TokenTable,
    *,
    most: int | None = None,
    log_probs: Scale | None = None,
) -> None:
    """Records [1] of the entries that are ADJUSTED become those of their adjusted values, in place.

    most: what the number of groups touched is known not to exceed, in any of these entries' slots.
    log_probs: bans, bias and penalties apply to the model's log-probs, of which this is the scale [P]. Tops are then those of
    adjusted log-probs; masses, and what the table does not touch, are left as they are.
    A row that is bad stays it, whatever is banned: a top of +inf is kept.
    Raises ValueError for shapes that don't match.
    """
    check_entries(entries, logits)
    count, groups = len(entries), -(-logits.shape[1] // GROUP)
    if stats.top.shape != (2, count, groups) or table.bits.shape[1] != groups:
        shapes = f"{list(stats.top.shape)} and {list(table.bits.shape)}"
        raise ValueError(f"records and table must be [2, {count}, {groups}] and [S, {groups}], not {shapes}")
    most = groups if most is None else min(most, groups)
    if not fused(logits):
        _reference(stats, logits, entries, table, log_probs)
        return
    capacity = table.cells.shape[1]
    lists = table.touched, table.touched_count
    through_cells = log_probs is None and count * most > DIRECT
    if through_cells:
        lists = torch.empty_like(stats.mass[1]), torch.zeros(count, dtype=torch.int32, device=logits.device)
        sizes = logits.stride(0), logits.shape[1], capacity
        grid = (count, -(-capacity // BLOCK))
        launch(_cells_kernel, grid, logits, entries, *stats, table.cells, *lists, *sizes, BLOCK=BLOCK)
    top, log_scale = (stats.top, stats.top) if log_probs is None else (log_probs.top, log_probs.log_scale)
    launch(
        _groups_kernel,
        (count, -(-most // TILE)),
        logits,
        entries,
        *stats,
        *table,
        *lists,
        top,
        log_scale,
        logits.stride(0),
        logits.shape[1],
        capacity,
        warps=1,
        LISTED=through_cells,
        LOG_PROBS=log_probs is not None,
        TILE=TILE,
    )


def _reference(stats: GroupStats, logits: Tensor, entries: Tensor, table: TokenTable, log_probs: Scale | None) -> None:
    """From whole adjusted rows; the same values but for the last bits of exp."""
    fields = entries.numpy().view(ENTRY)[:, 0]
    values = logits.float()[fields["row"]]
    if log_probs is not None:
        values = ((values - log_probs.top[:, None]).double() + log_probs.log_scale[:, None]).float()
    values = adjusted_rows(values, entries, table)
    own = np.zeros(len(entries), ENTRY)
    own["row"], own["flags"], own["temperature"] = np.arange(len(entries)), Entry.OWN, fields["temperature"]
    found = group_stats(values, torch.from_numpy(own.view(np.int32).reshape(entries.shape)), True)
    found.top[1].masked_fill_(stats.top[0] == torch.inf, torch.inf)
    for p, slot in enumerate(fields["slot"].tolist()):
        if fields["flags"][p] & Entry.ADJUSTED:
            group = table.touched[slot, : int(table.touched_count[slot])]
            for record, new in zip(stats[: 2 - (log_probs is not None)], found, strict=False):
                record[1, p, group] = new[1, p, group]


@jit
def _cells_kernel(
    logits: tl.tensor,
    entries: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    cells: tl.tensor,
    changed: tl.tensor,
    changed_count: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    capacity: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Corrects masses, and lists the groups whose tops may change: `changed` [P, G]. Entries that are ONLY have no records."""
    which = tl.program_id(0)
    entry = entries + which * ENTRY_WORDS
    flags = entry_int(entry, FLAGS)
    if (flags & (ADJUSTED | ONLY)) == ADJUSTED:
        index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        cell = cells + (entry_int(entry, SLOT).to(tl.int64) * capacity + index) * CELL
        token = tl.load(cell, mask=index < capacity, other=0) - 1
        used = token >= 0
        groups = tl.cdiv(vocab, _GROUP)
        place = which.to(tl.int64) * groups + token // _GROUP
        own = place + tl.num_programs(0).to(tl.int64) * groups
        top = tl.load(tops + place, mask=used, other=0.0)
        # Rows with +inf are bad whatever they hold, and -inf stays what it is.
        finite = used & (tl.abs(top) < float("inf"))
        top = tl.where(finite, top, 0.0)
        x = tl.load(logits + entry_int(entry, ROW).to(tl.int64) * stride + token, mask=used, other=0.0).to(tl.float32)
        y = adjusted_values(x, cell, used, entry, flags)
        temperature = entry_float(entry, TEMPERATURE)
        below = (x < top) & (y <= top)
        differs = finite & (x != y)
        change = token_mass(y, top, temperature) - token_mass(x, top, temperature)
        tl.atomic_add(masses + own, change, mask=differs & below, sem="relaxed")
        moved = differs & (below == 0)
        # The first to find a group changed lists it. Whatever changes are added to it, its mass stays negative then.
        before = tl.atomic_xchg(masses + own, tl.full(token.shape, -(1 << 30), tl.int32), mask=moved, sem="relaxed")
        first = (moved & (before >= 0)).to(tl.int32)
        begin = tl.atomic_add(changed_count + which, tl.sum(first, 0), sem="relaxed")
        tl.store(changed + which.to(tl.int64) * groups + begin + tl.cumsum(first, 0) - 1, token // _GROUP, mask=first != 0)


@jit(changing=("scale_top", "log_scale"))
def _groups_kernel(
    logits: tl.tensor,
    entries: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    touched: tl.tensor,
    touched_count: tl.tensor,
    changed: tl.tensor,
    changed_count: tl.tensor,
    scale_top: tl.tensor,
    log_scale: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    capacity: tl.tensor,
    LISTED: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Makes records again: those of `changed` groups where these are LISTED, else those of all that are touched."""
    which = tl.program_id(0)
    entry = entries + which * ENTRY_WORDS
    flags = entry_int(entry, FLAGS)
    if flags & ADJUSTED:
        groups = tl.cdiv(vocab, _GROUP)
        slot = entry_int(entry, SLOT).to(tl.int64)
        listed, count = touched + slot * groups, tl.load(touched_count + slot)
        if LISTED:
            only = (flags & ONLY) != 0
            listed = tl.where(only, listed, changed + which.to(tl.int64) * groups)
            count = tl.where(only, count, tl.load(changed_count + which))
        index = tl.program_id(1) * TILE + tl.arange(0, TILE)
        if tl.program_id(1) * TILE < count:
            valid = index < count
            group = tl.load(listed + index, mask=valid, other=0)
            row = logits + entry_int(entry, ROW).to(tl.int64) * stride
            top, scale = 0.0, 0.0
            if LOG_PROBS:
                top, scale = tl.load(scale_top + which), tl.load(log_scale + which)
            y = group_values(row, group, valid, vocab, entry, cells, bits, capacity, top, scale, True, LOG_PROBS)
            place = which.to(tl.int64) * groups + group
            model = tl.load(tops + place, mask=valid, other=0.0)
            best = tl.where(model == float("inf"), model, tl.max(y, 1))
            place += tl.num_programs(0).to(tl.int64) * groups
            tl.store(tops + place, best, mask=valid)
            if not LOG_PROBS:
                tl.store(masses + place, group_mass(y, best, entry_float(entry, TEMPERATURE)), mask=valid)


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    for dtype in ("bf16", "fp16", "fp32"):
        records = {"logits": f"*{dtype}", "entries": "*i32", "tops": "*fp32", "masses": "*i32", "cells": "*i32"}
        table = {"bits": "*i64", "touched": "*i32", "touched_count": "*i32"}
        changed = {"changed": "*i32", "changed_count": "*i32"}
        sizes = {"stride": "i64", "vocab": "i32", "capacity": "i32"}
        yield Variant(_cells_kernel, {**records, **changed, **sizes}, {"BLOCK": BLOCK})
        for listed, log_probs in ((False, False), (True, False), (False, True)):
            scale = {"scale_top": "*fp32", "log_scale": "*fp64" if log_probs else "*fp32"}
            constants = {"LISTED": listed, "LOG_PROBS": log_probs, "TILE": TILE}
            yield Variant(_groups_kernel, {**records, **table, **changed, **scale, **sizes}, constants, warps=1)

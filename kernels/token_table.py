"""The tokens of a slot whose logits are not the model's own: seen, banned or biased ones, in a hash table per slot.

It is kept from step to step: a token that is fed changes one cell, a fork copies a row. Beside the cells, a bit per
token says which ones the table holds, 64 to a word as tokens are grouped in the statistics, and a list names the groups
that have any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._triton import Variant, fused, jit, launch, tl
from .copy_rows import copy_rows
from .scratch import GROUP
from .token_cells import BANNED_AT, BIAS, COUNT, STATE, WORDS, State, insert

LEAST_CELLS = 16
BLOCK = 32  # tokens per program of one warp


class TokenTable(NamedTuple):
    """S slots, C cells each (a power of two), G groups of the vocabulary."""

    cells: Tensor  # int32 [S, C, WORDS], see token_cells.py
    bits: Tensor  # int64 [S, G], bit i of word g: the token 64 g + i has a cell
    touched: Tensor  # int32 [S, G], groups with a bit set, in any order
    touched_count: Tensor  # int32 [S], how many they are


def new_table(slots: int, capacity: int, vocab: int, device: torch.device) -> TokenTable:
    """An empty table; capacity: a power of two >= LEAST_CELLS. A slot should use half of it at most."""
    if capacity < LEAST_CELLS or capacity & (capacity - 1):
        raise ValueError(f"capacity={capacity} is refused: it must be a power of two >= {LEAST_CELLS}")
    groups = -(-vocab // GROUP)
    return TokenTable(
        torch.zeros(slots, capacity, WORDS, dtype=torch.int32, device=device),
        torch.zeros(slots, groups, dtype=torch.int64, device=device),
        torch.zeros(slots, groups, dtype=torch.int32, device=device),
        torch.zeros(slots, dtype=torch.int32, device=device),
    )


def mark(
    table: TokenTable, slot: Tensor, token: Tensor, state: Tensor, bias: Tensor | None = None, banned_at: Tensor | None = None
) -> None:
    """Notes that tokens were seen, are banned or biased; those that are new to their slot get cells.

    slot: int32 [N]; token: int32 or int64 [N], in the vocabulary; entries with a negative slot or token are skipped. The COUNT
    bits of state, int32 [N], are added, its flags set. bias: fp32 [N], takes the place of the old one where it is not 0,
    for a (slot, token) pair once at most. banned_at: int32 [N], set where > 0. In a slot that is full, new tokens are
    lost. Raises ValueError for other shapes and types.
    """
    given = {"slot": slot, "token": token, "state": state, "bias": bias, "banned_at": banned_at}
    for name, values in given.items():
        allowed = {"bias": (torch.float32,), "token": (torch.int32, torch.int64)}.get(name, (torch.int32,))
        if values is not None and (values.shape != (len(slot),) or values.dtype not in allowed or not values.is_contiguous()):
            kinds = " or ".join(map(str, allowed))
            raise ValueError(f"{name} must be contiguous {kinds} [{len(slot)}], not {values.dtype} {list(values.shape)}")
    if not fused(table.cells):
        reference_mark(table, slot, token, state, bias, banned_at)
        return
    capacity, groups, count = table.cells.shape[1], table.bits.shape[1], len(slot)
    launch(
        _mark_kernel,
        (-(-count // BLOCK),),
        *table,
        slot,
        token,
        state,
        state if bias is None else bias,
        state if banned_at is None else banned_at,
        count,
        capacity,
        groups,
        warps=1,
        HAS_BIAS=bias is not None,
        HAS_BAN=banned_at is not None,
        BLOCK=BLOCK,
    )


def reference_mark(
    table: TokenTable, slot: Tensor, token: Tensor, state: Tensor, bias: Tensor | None = None, banned_at: Tensor | None = None
) -> None:
    """One entry after the other, for tables on the CPU."""
    cells, bits, touched, touched_count = (part.numpy() for part in table)
    capacity, low = cells.shape[1], State.COUNT
    for i, (s, t) in enumerate(zip(slot.tolist(), token.tolist(), strict=True)):
        if s < 0 or t < 0:
            continue
        place = (t * 2654435769 % 2**32) * capacity >> 32
        for _ in range(capacity):
            if cells[s, place, 0] in (0, t + 1):
                break
            place = (place + 1) % capacity
        else:
            continue
        cell, word = cells[s, place], np.uint64(bits[s, t // GROUP].astype(np.uint64))
        if cell[0] == 0:
            cell[0] = t + 1
            if word == 0:
                touched[s, touched_count[s]] = t // GROUP
                touched_count[s] += 1
            bits[s, t // GROUP] = (word | np.uint64(1) << np.uint64(t % GROUP)).astype(np.int64)
        given = int(state[i])
        cell[1] = (cell[1] + (given & low)) | (given & ~low)
        if bias is not None and float(bias[i]) != 0:
            cell[2] = bias[i].view(torch.int32).item()
        if banned_at is not None and int(banned_at[i]) > 0:
            cell[3] = int(banned_at[i])


def clear(table: TokenTable, slots: Tensor) -> None:
    """Takes everything out of slots, int64 [N]."""
    for part in (table.cells, table.bits, table.touched_count):
        part.index_fill_(0, slots, 0)


def fork(table: TokenTable, src: Tensor, dst: Tensor) -> None:
    """Slots dst become src, int64 [N] each, no dst twice; every source is read before any destination is written."""
    for part in table:
        copy_rows(part, src, dst)


def grown(table: TokenTable, slots: int, capacity: int) -> TokenTable:
    """A table with room for more: at least as many slots and cells as this one has, and all that it holds."""
    old_slots, old_capacity, _ = table.cells.shape
    new = new_table(slots, capacity, GROUP * table.bits.shape[1], table.cells.device)
    if capacity == old_capacity:
        for part, old in zip(new, table, strict=True):
            part[:old_slots] = old
        return new
    slot = torch.arange(old_slots, dtype=torch.int32, device=table.cells.device).repeat_interleave(old_capacity)
    token, state, bias, banned_at = table.cells.view(-1, WORDS).t().contiguous()
    mark(new, slot, token - 1, state, bias.view(torch.float32), banned_at)
    return new


@jit(changing=("slots", "tokens", "states", "biases", "bans", "count"))
def _mark_kernel(
    cells: tl.tensor,
    bits: tl.tensor,
    touched: tl.tensor,
    touched_count: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    states: tl.tensor,
    biases: tl.tensor,
    bans: tl.tensor,
    count: tl.tensor,
    capacity: tl.tensor,
    groups: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_BAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < count
    slot = tl.load(slots + lane, mask=inside, other=-1)
    token = tl.load(tokens + lane, mask=inside, other=-1).to(tl.int32)
    active = (slot >= 0) & (token >= 0)
    slot, token = tl.where(active, slot, 0), tl.where(active, token, lane)
    cell, active = insert(cells, bits, touched, touched_count, slot, token, active, capacity, groups)
    state = tl.load(states + lane, mask=active, other=0)
    tl.atomic_add(cell + STATE, state & COUNT, mask=active & ((state & COUNT) != 0), sem="relaxed")
    tl.atomic_or(cell + STATE, state & ~COUNT, mask=active & ((state & ~COUNT) != 0), sem="relaxed")
    if HAS_BIAS:
        bias = tl.load(biases + lane, mask=active, other=0.0)
        tl.store(cell + BIAS, bias.to(tl.int32, bitcast=True), mask=active & (bias != 0))
    if HAS_BAN:
        banned_at = tl.load(bans + lane, mask=active, other=0)
        tl.store(cell + BANNED_AT, banned_at, mask=active & (banned_at > 0))


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    table = {"cells": "*i32", "bits": "*i64", "touched": "*i32", "touched_count": "*i32"}
    sizes = {"count": "i32", "capacity": "i32", "groups": "i32"}
    for token, bias, ban in (("*i64", False, False), ("*i32", True, False), ("*i32", True, True)):
        given = {"slots": "*i32", "tokens": token, "states": "*i32", "biases": "*fp32" if bias else "*i32", "bans": "*i32"}
        constants = {"HAS_BIAS": bias, "HAS_BAN": ban, "BLOCK": BLOCK}
        yield Variant(_mark_kernel, {**table, **given, **sizes}, constants, warps=1)

"""The most probable tokens of every entry, exactly ordered, from the records of its groups: by value, ties to the lower id.

The n best tokens lie in the n groups that come first by (top down, id up): a token outside of them comes after n tops.
So one program per entry picks N >= n groups by their tops, reads those, keeps at most 2 N tokens that reach the n-th
largest value, and counts for each how many come before it. Thresholds are found on integer keys: no value is sorted,
and none depends on what else is in the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ._order import (
    LOWEST,
    NOTHING,
    best_places,
    chosen_groups,
    listed_token,
    ordered,
    packed_index,
    packed_key,
    ranks,
    store_packed,
    unordered,
)
from ._reading import check_reading, read_groups, reads_own, table_parts
from ._triton import Variant, constant, jit, launch, power_of_two, tl
from .entries import ENTRY_WORDS, ROW, entry_int
from .group_stats import GroupStats
from .scratch import GROUP
from .token_table import TokenTable

MAX_BEST = 128
_FEWEST = 32  # groups read: fewer save little, and the window N - n lets the search end early
_REGISTERS = 128  # what 16 warps can have
_GROUP = constant(GROUP)


def best_tokens(
    logits: Tensor,
    entries: Tensor,
    stats: GroupStats,
    table: TokenTable | None,
    n: int,
    floor: Tensor | None = None,
    own: Tensor | None = None,
    *,
    impossible: bool = False,
) -> tuple[Tensor, Tensor]:
    """ids int64 [P, n] and values fp32 [P, n] of the n best tokens of each entry, value down, id up.

    logits: floating [U, V]; entries: int32 [P, WORDS]; stats: theirs, after `adjust_stats`; table: None where no entry is
    ADJUSTED. own: bool [P], entries read by the adjusted values, of which those below floor (fp32 [P]) do not count.
    Past the end ids are -1 and values -inf; with `impossible`, tokens of value -inf are listed too.
    Of bad rows the result means nothing. Raises ValueError for other shapes, and unless 1 <= n <= MAX_BEST.
    """
    check_reading(logits, entries, stats, own)
    if not 1 <= n <= MAX_BEST:
        raise ValueError(f"n={n} is refused: it must be in [1, {MAX_BEST}]")
    count, device = len(entries), logits.device
    if floor is not None and (
        floor.shape != (count,) or floor.dtype != torch.float32 or not floor.is_contiguous() or own is None
    ):
        raise ValueError(f"floor must be contiguous float32 [{count}] and come with own, not {floor.dtype} {list(floor.shape)}")
    ids = torch.empty(count, n, dtype=torch.int64, device=device)
    values = torch.empty(count, n, dtype=torch.float32, device=device)
    width = power_of_two(n, _FEWEST)
    scratch = torch.empty(count, 3 * width, dtype=torch.int64, device=device)
    table = None if own is None else table
    launch(
        _kernel, (count,), logits, entries, stats.top, entries if own is None else own, stats.top if floor is None else floor,
        scratch, ids, values, *table_parts(table, entries), logits.stride(0), logits.shape[1], n,
        HAS_OWN=own is not None, HAS_FLOOR=floor is not None, ADJUST=table is not None, IMPOSSIBLE=impossible,
        BLOCK=power_of_two(stats.top.shape[2], _FEWEST), N=width, warps=_warps(width), registers=_REGISTERS,
    )  # fmt: skip
    return ids, values


def _warps(width: int) -> int:
    return 16 if width > 64 else 8


@jit(changing=("own", "floor", "n"))
def _kernel(
    logits: tl.tensor,
    entries: tl.tensor,
    tops: tl.tensor,
    own: tl.tensor,
    floor: tl.tensor,
    scratch: tl.tensor,
    ids: tl.tensor,
    values: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    n: tl.tensor,
    HAS_OWN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    ADJUST: tl.constexpr,
    IMPOSSIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    entry = entries + index * ENTRY_WORDS
    row = logits + entry_int(entry, ROW).to(tl.int64) * stride
    groups = tl.cdiv(vocab, _GROUP)
    tops += index.to(tl.int64) * groups
    adjusted = reads_own(entry, own, index, HAS_OWN)
    tops += tl.where(adjusted, tl.num_programs(0).to(tl.int64) * groups, 0)
    scratch += index.to(tl.int64) * (3 * N)
    group = tl.arange(0, BLOCK)
    top = tl.where(group < groups, ordered(tl.load(tops + group, mask=group < groups, other=0)), NOTHING)
    chosen, found, low = chosen_groups(top, tl.full([], LOWEST, tl.int32), scratch + 2 * N, n, N)
    valid = tl.arange(0, N) < found
    x = read_groups(row, chosen, valid, vocab, entry, cells, bits, capacity, adjusted, ADJUST)
    token = chosen[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    key = tl.reshape(tl.where(valid[:, None] & (token < vocab), ordered(x), NOTHING), [N * _GROUP])
    place, count = best_places(key, low, n, 2 * N)
    store_packed(scratch, place, key, tl.arange(0, N * _GROUP))
    tl.debug_barrier()
    lane = tl.arange(0, 2 * N)
    pair = tl.load(scratch + lane, mask=lane < count, other=0)
    place = tl.where(lane < count, ranks(pair, scratch, count, 2 * N), lane)
    token = listed_token(packed_index(pair), scratch + 2 * N, lane < count)
    value = unordered(packed_key(pair))
    real = lane < count
    if not IMPOSSIBLE:
        real = real & (value > -float("inf"))
    if HAS_FLOOR:
        real = real & (value >= tl.where(tl.load(own + index), tl.load(floor + index), -float("inf")))
    out = index.to(tl.int64) * n + place
    tl.store(ids + out, tl.where(real, token, -1), mask=place < n)
    tl.store(values + out, tl.where(real, value, -float("inf")), mask=place < n)


def variants() -> Iterator[Variant]:
    """Every configuration that is launched, for vocabularies of up to 2^18 tokens."""
    given = {"entries": "i32", "tops": "fp32", "own": "i1", "floor": "fp32"}
    rest = {"scratch": "i64", "ids": "i64", "values": "fp32", "cells": "i32", "bits": "i64"}
    numbers = {"capacity": "i32", "stride": "i64", "vocab": "i32", "n": "i32"}
    uses = [(False, False, False), (True, False, False), (True, False, True), (True, True, False), (True, True, True)]
    for dtype, block, width in itertools.product(("bf16", "fp16", "fp32"), (512, 2048, 4096), (_FEWEST, 64, MAX_BEST)):
        types = {name: f"*{kind}" for name, kind in {"logits": dtype, **given, **rest}.items()} | numbers
        for own, floor, adjust in uses:
            for impossible in (False,) if own else (False, True):
                flags = {"HAS_OWN": own, "HAS_FLOOR": floor, "ADJUST": adjust, "IMPOSSIBLE": impossible}
                yield Variant(_kernel, types, {**flags, "BLOCK": block, "N": width}, _warps(width), _REGISTERS)

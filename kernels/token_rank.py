"""Values and ranks of given tokens: the read-out of prompts' own tokens, and of tokens chosen elsewhere.

    rank[p, j] = 1 + the number of tokens t with x[p, t] > x[p, token[p, j]]

Only groups whose largest value is larger are read. Counts are integers, so how a row is cut changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._reading import check_reading, read_groups, read_tokens, reads_own, table_parts
from ._triton import Variant, constant, jit, launch, power_of_two, tl
from .entries import ENTRY_WORDS, ROW, entry_int
from .group_stats import GroupStats
from .scratch import GROUP
from .token_table import TokenTable

TILE = 32  # groups read at once
_PROGRAMS = 4096  # are enough to keep a device busy; beyond, a program takes more tiles
_GROUP = constant(GROUP)


def token_values(logits: Tensor, entries: Tensor, table: TokenTable | None, token: Tensor, own: Tensor | None = None) -> Tensor:
    """fp32 [P, m]: the values of tokens [P, m] (integers), -inf outside of the vocabulary.

    logits: floating [U, V]; entries: int32 [P, WORDS]; table: None where no entry is ADJUSTED. own: bool [P], entries of which
    adjusted values are asked. Raises ValueError for other shapes.
    """
    check_reading(logits, entries, None, own)
    _check_tokens(token, entries)
    values = torch.empty(token.shape, dtype=torch.float32, device=logits.device)
    table = None if own is None else table
    launch(
        _values_kernel, (len(entries),), logits, entries, token, entries if own is None else own, values,
        *table_parts(table, entries), logits.stride(0), logits.shape[1], token.shape[1],
        HAS_OWN=own is not None, ADJUST=table is not None, BLOCK=power_of_two(token.shape[1]), warps=1,
    )  # fmt: skip
    return values


def token_ranks(
    logits: Tensor, entries: Tensor, stats: GroupStats, table: TokenTable | None, token: Tensor, own: Tensor | None = None
) -> Tensor:
    """int64 [P, m]: 1 + how many tokens of the entry have a larger value than each of tokens [P, m]; 0 for a negative one.

    stats: of the entries, after `adjust_stats`. The others as in `token_values`.
    """
    check_reading(logits, entries, stats, own)
    _check_tokens(token, entries)
    ranks = torch.ones(token.shape, dtype=torch.int64, device=logits.device)
    table = None if own is None else table
    pairs, tiles = token.numel(), -(-stats.top.shape[2] // TILE)
    each = max(1, min(tiles, pairs * tiles // _PROGRAMS))
    launch(
        _ranks_kernel, (pairs, -(-tiles // each)), logits, entries, stats.top, token, entries if own is None else own, ranks,
        *table_parts(table, entries), logits.stride(0), logits.shape[1], len(entries), token.shape[1], each,
        HAS_OWN=own is not None, ADJUST=table is not None, TILE=TILE, warps=_warps(table is not None),
    )  # fmt: skip
    return ranks


def _warps(adjust: bool) -> int:
    return 8 if adjust else 4


def _check_tokens(token: Tensor, entries: Tensor) -> None:
    if token.ndim != 2 or len(token) != len(entries) or token.is_floating_point() or not token.is_contiguous():
        raise ValueError(f"token must be contiguous integers [{len(entries)}, m], not {token.dtype} {list(token.shape)}")


@jit(changing=("tokens", "own", "m"))
def _values_kernel(
    logits: tl.tensor,
    entries: tl.tensor,
    tokens: tl.tensor,
    own: tl.tensor,
    values: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    m: tl.tensor,
    HAS_OWN: tl.constexpr,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    entry = entries + index * ENTRY_WORDS
    row = logits + entry_int(entry, ROW).to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)[:, None]
    place = index.to(tl.int64) * m + lane
    token = tl.load(tokens + place, mask=lane < m, other=-1).to(tl.int32)
    asked = reads_own(entry, own, index, HAS_OWN)
    x = read_tokens(row, token, vocab, entry, cells, bits, capacity, asked, ADJUST)
    tl.store(values + place, x, mask=lane < m)


@jit(changing=("tokens", "own", "count", "m", "each"))
def _ranks_kernel(
    logits: tl.tensor,
    entries: tl.tensor,
    tops: tl.tensor,
    tokens: tl.tensor,
    own: tl.tensor,
    ranks: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    count: tl.tensor,
    m: tl.tensor,
    each: tl.tensor,
    HAS_OWN: tl.constexpr,
    ADJUST: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    index = pair // m
    entry = entries + index * ENTRY_WORDS
    row = logits + entry_int(entry, ROW).to(tl.int64) * stride
    groups = tl.cdiv(vocab, _GROUP)
    asked = reads_own(entry, own, index, HAS_OWN)
    tops += (index.to(tl.int64) + tl.where(asked, count, 0)) * groups
    token = tl.load(tokens + pair + tl.zeros([1, 1], tl.int32)).to(tl.int32)
    value = read_tokens(row, token, vocab, entry, cells, bits, capacity, asked, ADJUST)
    larger = tl.zeros([TILE, _GROUP], tl.int32)
    first = tl.program_id(1) * each * TILE
    for begin in range(first, tl.minimum(first + each * TILE, groups), TILE):
        group = begin + tl.arange(0, TILE)
        top = tl.load(tops + group, mask=group < groups, other=-float("inf"))
        wanted = top > tl.max(value)
        if tl.max(wanted.to(tl.int32), 0) > 0:
            x = read_groups(row, group, wanted, vocab, entry, cells, bits, capacity, asked, ADJUST)
            larger += (x > value).to(tl.int32)
    total = tl.sum(tl.sum(larger, 1), 0)
    if tl.max(token) < 0:
        total = tl.where(tl.program_id(1) == 0, -1, 0)
    tl.atomic_add(ranks + pair, total.to(tl.int64), sem="relaxed")


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    rest = {"cells": "*i32", "bits": "*i64", "capacity": "i32", "stride": "i64", "vocab": "i32"}
    for dtype in ("bf16", "fp16", "fp32"):
        given = {"logits": f"*{dtype}", "entries": "*i32"}
        for own, adjust in ((False, False), (True, False), (True, True)):
            flags = {"HAS_OWN": own, "ADJUST": adjust}
            for block in (1, 32, 128):
                types = {**given, "tokens": "*i64", "own": "*i1", "values": "*fp32", **rest, "m": "i32"}
                yield Variant(_values_kernel, types, {**flags, "BLOCK": block}, 1)
            types = {**given, "tops": "*fp32", "tokens": "*i64", "own": "*i1", "ranks": "*i64", **rest}
            numbers = {"count": "i32", "m": "i32", "each": "i32"}
            yield Variant(_ranks_kernel, {**types, **numbers}, {**flags, "TILE": TILE}, _warps(adjust))

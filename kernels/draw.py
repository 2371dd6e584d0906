"""Draws one token per entry: temperature, top-k, top-p, min-p, then the inverse CDF in token-id order; one program each.

The program reads the records of `group_stats`. They alone decide in which group an unlimited draw falls; limits are
found from the groups whose tops are large (`_limits.py`). A weight is an integer in units of 2^-40 of the largest, so
no layout, no batch and no path changes a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._limits import OFF, draw_of_few, draw_of_many, pick
from ._order import ordered, unordered
from ._reading import table_parts
from ._triton import Variant, constant, fused, jit, launch, power_of_two, tl
from .adjusted import group_values
from .distribution import Scale
from .entries import (
    ENTRY_WORDS,
    FLAGS,
    GREEDY,
    MIN_P_DEPTH,
    OWN,
    POSITION,
    PROCESSED,
    ROW,
    SEED,
    STREAM,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    check_entries,
    entry_double,
    entry_float,
    entry_int,
    entry_long,
)
from .group_stats import GroupStats
from .philox import aimed, uniform_bits
from .scales import ScaleBuffers, fall_rate, log_scale_of, store_scale, value_weight, weigh
from .scratch import GROUP
from .token_table import TokenTable

CANDIDATES = 256  # values among which the limits of most rows are found, each compared with each; 0: always by passes
_GROUP = constant(GROUP)
_MINUS_INFINITY = constant(-float("inf"))


class Draws(NamedTuple):
    """Of P entries."""

    token: Tensor  # int64 [P]; 0 where bad
    logprob: Tensor  # fp32 [P], of the processed distribution where PROCESSED, else of the model's; 0 where bad
    bad: Tensor  # bool [P]: the model's or the entry's own distribution is no distribution
    model: Scale
    processed: Scale  # of the distribution that was drawn from, with the smallest value kept as its floor


def draw(logits: Tensor, entries: Tensor, stats: GroupStats, table: TokenTable | None, *, filtered: bool) -> Draws:
    """logits: floating [U, V]; entries: int32 [P, WORDS] of `ENTRY`; stats: their records, adjusted by `table`.

    filtered: whether any entry has a limit. The limits of entries that are GREEDY matter where they are PROCESSED.
    Raises ValueError for shapes that do not go together, and without a device that runs kernels.
    """
    check_entries(entries, logits)
    count, groups = len(entries), -(-logits.shape[1] // GROUP)
    if stats.top.shape[1:] != (count, groups):
        raise ValueError(f"records of {list(stats.top.shape)} do not go with {count} entries of {groups} groups")
    if not fused(logits):
        raise ValueError("draws from records come from a kernel: they need a CUDA device")
    block = power_of_two(groups, 64)
    out = ScaleBuffers.empty(2, count, logits.device)
    token = torch.empty(count, dtype=torch.int64, device=logits.device)
    logprob, bad = out.floats.new_empty(count), out.bad.new_empty(count)
    words = block + 2 * CANDIDATES if filtered else 0
    launch(
        _kernel,
        (count,),
        logits,
        entries,
        *stats,
        *table_parts(table, entries),
        token.new_empty((count, words), dtype=torch.int32),
        token,
        logprob,
        bad,
        *out,
        logits.stride(0),
        logits.shape[1],
        groups,
        warps=_warps(block, filtered),
        FILTERED=filtered,
        ADJUST=table is not None,
        BLOCK=block,
        CANDIDATES=CANDIDATES,
    )
    return Draws(token, logprob, bad, out.scale(0), out.scale(1))


def _warps(block: int, filtered: bool) -> int:
    return 8 if filtered or block >= 2048 else 4


@jit
def _kernel(
    logits: tl.tensor,
    entries: tl.tensor,
    top: tl.tensor,
    mass: tl.tensor,
    cells: tl.tensor,
    table_bits: tl.tensor,
    capacity: tl.tensor,
    scratch: tl.tensor,
    tokens: tl.tensor,
    logprobs: tl.tensor,
    bads: tl.tensor,
    floats: tl.tensor,
    log_scales: tl.tensor,
    scale_bads: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    groups: tl.tensor,
    FILTERED: tl.constexpr,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    entry = entries + tl.program_id(0) * ENTRY_WORDS
    flags = entry_int(entry, FLAGS)
    row = logits + entry_int(entry, ROW).to(tl.int64) * stride
    group = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * groups
    tops = tl.load(top + first + group, mask=group < groups, other=_MINUS_INFINITY)
    masses = tl.load(mass + first + group, mask=group < groups, other=0)
    temperature = tl.full([], 1.0, tl.float32)
    model_bad, model_best, weights = weigh(tops, masses, temperature)
    model_log_scale = log_scale_of(tl.sum(weights, 0))
    store_scale(floats, log_scales, scale_bads, 0, model_bad, model_best, temperature, model_log_scale, _MINUS_INFINITY)
    bad, best = model_bad, model_best
    if flags & OWN:
        first += tl.num_programs(0).to(tl.int64) * groups
        tops = tl.load(top + first + group, mask=group < groups, other=_MINUS_INFINITY)
        masses = tl.load(mass + first + group, mask=group < groups, other=0)
        temperature = entry_float(entry, TEMPERATURE)
        bad, best, weights = weigh(tops, masses, temperature)
    bad = bad | model_bad
    total = tl.sum(weights, 0)
    token, value, floor = tl.full([], 0, tl.int32), best, tl.full([], _MINUS_INFINITY, tl.float32)
    if bad == 0:
        source = (row, vocab, entry, cells, table_bits, capacity)
        rate = fall_rate(temperature)
        bits = uniform_bits(entry_long(entry, SEED), entry_long(entry, STREAM), entry_int(entry, POSITION))
        limited = False
        limits = _limits(entry, best, vocab)
        if FILTERED:
            top_k, top_p, min_floor = limits
            some = (top_k < OFF) | (top_p < 1.0) | (min_floor > _MINUS_INFINITY)
            limited = some & (((flags & GREEDY) == 0) | ((flags & PROCESSED) != 0))
        if ((flags & GREEDY) != 0) | (limited == 0):
            token, value = _draw_from_all(source, tops, weights, best, rate, total, bits, flags, ADJUST, BLOCK)
        if FILTERED:  # noqa: SIM102
            if limited:
                own = scratch + tl.program_id(0).to(tl.int64) * (BLOCK + 2 * CANDIDATES)
                decided = False
                drawn, its_value, kept = token, value, total
                if CANDIDATES > 0:
                    decided, drawn, its_value, kept, floor = draw_of_few(
                        source, tops, groups, best, rate, total, limits, bits, own, ADJUST, BLOCK, CANDIDATES
                    )
                if decided == 0:
                    drawn, its_value, kept, floor = draw_of_many(
                        source, top + first, groups, best, rate, total, limits, bits, own, ADJUST, BLOCK
                    )
                token = tl.where((flags & GREEDY) != 0, token, drawn)
                value = tl.where((flags & GREEDY) != 0, value, its_value)
                total = kept
    log_scale = log_scale_of(total)
    store_scale(floats, log_scales, scale_bads, 1, bad, best, temperature, log_scale, floor)
    depth = tl.div_rn(value - best, temperature)
    if (flags & PROCESSED) == 0:
        log_scale = model_log_scale
        depth = tl.load(row + token).to(tl.float32) - model_best
    logprob = (depth.to(tl.float64) + log_scale).to(tl.float32)
    tl.store(tokens + tl.program_id(0), token.to(tl.int64))
    tl.store(logprobs + tl.program_id(0), tl.where(bad, 0.0, logprob))
    tl.store(bads + tl.program_id(0), bad)


@jit
def _limits(entry: tl.tensor, best: tl.tensor, vocab: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """top_k (OFF where off), top_p (float64, 1 where off), and the smallest fp32 value that passes min-p (-inf where off)."""
    top_k = entry_int(entry, TOP_K)
    top_k = tl.where((top_k > 0) & (top_k < vocab), top_k, OFF)
    exact = best.to(tl.float64) + entry_double(entry, MIN_P_DEPTH)
    floor = exact.to(tl.float32)
    next_floor = unordered(ordered(floor) + 1)
    floor = tl.where(floor.to(tl.float64) < exact, next_floor, floor)
    return top_k, entry_double(entry, TOP_P), tl.where(exact == exact, floor, _MINUS_INFINITY)


@jit
def _draw_from_all(
    source: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    total: tl.tensor,
    bits: tl.tensor,
    flags: tl.tensor,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A token (int32) and its value, where nothing is filtered out: the best one where GREEDY, the lowest id of ties."""
    row, vocab, entry, cells, table_bits, capacity = source
    greedy = (flags & GREEDY) != 0
    aim = aimed(bits, total)
    passed = tl.cumsum(weights, 0) <= aim
    place = tl.arange(0, BLOCK)
    chosen = tl.where(greedy, tl.min(tl.where(tops == best, place, BLOCK), 0), tl.sum(passed.to(tl.int32), 0))
    chosen = tl.minimum(chosen, BLOCK - 1)
    group = chosen + tl.zeros([1], tl.int32)
    x = group_values(row, group, group >= 0, vocab, entry, cells, table_bits, capacity, 0.0, 0.0, ADJUST, False)
    group_top = tl.max(tl.max(x, 1), 0)
    # What is left to aim at within the group, in its own finer weights; the best one is where its weights begin to count.
    weight = tl.where(greedy, (x == group_top).to(tl.int64), value_weight(x, group_top, rate))
    left = (aim - tl.sum(tl.where(passed, weights, 0), 0)).to(tl.float64)
    share = left / tl.sum(tl.where(place == chosen, weights, 0), 0).to(tl.float64)
    inside = tl.sum(tl.sum(weight, 1), 0)
    inner = tl.minimum((share * inside.to(tl.float64)).to(tl.int64), inside - 1)
    token, value = pick(weight, group, x, tl.where(greedy, 0, inner), 1)
    return token, value


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    for dtype, block in (("bf16", 512), ("bf16", 2048), ("bf16", 4096), ("fp16", 4096), ("fp32", 4096)):
        types = {
            "logits": f"*{dtype}",
            "entries": "*i32",
            "top": "*fp32",
            "mass": "*i32",
            "cells": "*i32",
            "table_bits": "*i64",
            "capacity": "i32",
            "scratch": "*i32",
            "tokens": "*i64",
            "logprobs": "*fp32",
            "bads": "*i1",
            "floats": "*fp32",
            "log_scales": "*fp64",
            "scale_bads": "*i1",
            "stride": "i64",
            "vocab": "i32",
            "groups": "i32",
        }
        for filtered, adjust in itertools.product((False, True), repeat=2):
            constants = {"FILTERED": filtered, "ADJUST": adjust, "BLOCK": block, "CANDIDATES": CANDIDATES}
            yield Variant(_kernel, types, constants, _warps(block, filtered))

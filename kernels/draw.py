"""Draws one token per entry: temperature, top-k, top-p, min-p, then the inverse CDF in token-id order; one program each.

The program reads the records of `group_stats`. They alone decide in which group an unlimited draw falls; limits are
found from the groups whose tops are large (`_limits.py`), and where these don't do by a second kernel (`_flat.py`), which
leaves the other entries alone. A weight is an integer in units of 2^-40 of the largest, so
no layout, no batch and no path changes a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._draw_parts import OFF, draw_from_all, limits_of, store_draw
from ._flat import flat_kernel
from ._flat import settings as flat_settings
from ._limits import FEW, draw_of_few
from ._reading import table_parts
from ._triton import Variant, constant, jit, launch, need_kernels, power_of_two, tl
from .distribution import Scale
from .entries import (
    ENTRY_WORDS,
    FLAGS,
    GREEDY,
    OWN,
    POSITION,
    PROCESSED,
    ROW,
    SEED,
    STREAM,
    TEMPERATURE,
    check_entries,
    entry_float,
    entry_int,
    entry_long,
)
from .group_stats import GroupStats, fall_rate
from .philox import uniform_bits
from .scales import ScaleBuffers, log_scale_of, store_scale, weigh
from .scratch import GROUP
from .token_table import TokenTable

CANDIDATES = 256  # values among which the limits of most rows are found, each compared with each
_GROUP = constant(GROUP)
_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
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
    need_kernels(logits)
    block = power_of_two(groups, 128)
    out = ScaleBuffers.empty(2, count, logits.device)
    token = torch.empty(count, dtype=torch.int64, device=logits.device)
    logprob, bad = out.floats.new_empty(count), out.bad.new_empty(count)
    scratch = token.new_empty(count, max(FEW + CANDIDATES, block // 2) if filtered else 0)
    given = (logits, entries, *stats, *table_parts(table, entries))
    sizes = (logits.stride(0), logits.shape[1], groups)
    adjusted = table is not None
    launch(
        _kernel,
        (count,),
        *given,
        scratch,
        token,
        logprob,
        *out,
        bad,
        *sizes,
        scratch.shape[1],
        warps=_warps(block, filtered, adjusted),
        FILTERED=filtered,
        ADJUST=adjusted,
        BLOCK=block,
        CANDIDATES=CANDIDATES,
    )
    if filtered:
        launch(
            flat_kernel,
            (count,),
            *given,
            scratch.view(torch.int32),
            token,
            logprob,
            *out,
            *sizes,
            2 * scratch.shape[1],
            ADJUST=adjusted,
            BLOCK=block,
            **flat_settings(logits.dtype, adjusted),
        )
    return Draws(token, logprob, bad, out.scale(0), out.scale(1))


def _warps(block: int, filtered: bool, adjusted: bool) -> int:
    # Adjusted values of a whole tile take so many registers that 8 warps would keep a second program away anyway.
    return 16 if filtered and adjusted else 8 if filtered or block >= 2048 else 4


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
    floats: tl.tensor,
    log_scales: tl.tensor,
    scale_bads: tl.tensor,
    bads: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    groups: tl.tensor,
    words: tl.tensor,
    FILTERED: tl.constexpr,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    """scratch: int64 [P, words]. Tokens that stay undecided are -1."""
    ROWS: tl.constexpr = BLOCK // _GROUP
    which = tl.program_id(0)
    entry = entries + which * ENTRY_WORDS
    flags = entry_int(entry, FLAGS)
    row = logits + entry_int(entry, ROW).to(tl.int64) * stride
    first = which.to(tl.int64) * groups
    temperature = tl.full([], 1.0, tl.float32)
    model_bad, model_best, tops, weights = weigh(top + first, mass + first, groups, temperature, ROWS)
    total = tl.sum(weights, 0)
    model_log_scale = log_scale_of(total)
    store_scale(floats, log_scales, scale_bads, 0, model_bad, model_best, temperature, model_log_scale, _MINUS_INFINITY)
    bad, best = model_bad, model_best
    if flags & OWN:
        first += tl.num_programs(0).to(tl.int64) * groups
        temperature = entry_float(entry, TEMPERATURE)
        bad, best, tops, weights = weigh(top + first, mass + first, groups, temperature, ROWS)
        total = tl.sum(weights, 0)
    bad = bad | model_bad
    token, value, floor = tl.full([], 0, tl.int32), best, tl.full([], _MINUS_INFINITY, tl.float32)
    decided = True
    if bad == 0:
        source = (row, vocab, entry, cells, table_bits, capacity)
        rate = fall_rate(temperature)
        bits = uniform_bits(entry_long(entry, SEED), entry_long(entry, STREAM), entry_int(entry, POSITION))
        greedy = (flags & GREEDY) != 0
        limited = False
        if FILTERED:
            top_k, top_p, min_floor = limits_of(entry, best, vocab)
            some = (top_k < OFF) | (top_p < 1.0) | (min_floor > _MINUS_INFINITY)
            limited = some & ((flags & (GREEDY | PROCESSED)) != GREEDY)
        if limited:
            if FILTERED:
                own = scratch + which.to(tl.int64) * words
                decided, token, value, total, floor = draw_of_few(
                    source, top + first, groups, best, rate, total, greedy, bits, own, ADJUST, BLOCK, CANDIDATES
                )
                token = tl.where(decided, token, 0)
        else:
            records = (top + first, mass + first, groups, temperature)
            token, value = draw_from_all(source, records, best, tops, weights, total, greedy, bits, ADJUST)
    out = (logprobs, floats, log_scales, scale_bads)
    model = (row, model_best, model_log_scale)
    tl.store(bads + which, bad)
    tl.store(tokens + which, tl.where(decided, token, -1).to(tl.int64))
    store_draw(out, token, value, model, (flags & PROCESSED) != 0, bad, best, temperature, total, floor)


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    for kind, block in (*itertools.product(kinds, (4096,)), (torch.bfloat16, 2048), (torch.bfloat16, 512)):
        types = {
            "logits": f"*{_KINDS[kind]}",
            "entries": "*i32",
            "top": "*fp32",
            "mass": "*i32",
            "cells": "*i32",
            "table_bits": "*i64",
            "capacity": "i32",
            "scratch": "*i64",
            "tokens": "*i64",
            "logprobs": "*fp32",
            "floats": "*fp32",
            "log_scales": "*fp64",
            "scale_bads": "*i1",
            "bads": "*i1",
            "stride": "i64",
            "vocab": "i32",
            "groups": "i32",
            "words": "i32",
        }
        for filtered, adjust in itertools.product((False, True), repeat=2):
            constants = {"FILTERED": filtered, "ADJUST": adjust, "BLOCK": block, "CANDIDATES": CANDIDATES}
            yield Variant(_kernel, types, constants, _warps(block, filtered, adjust))
        types = {name: "*i32" if name == "scratch" else given for name, given in types.items() if name != "bads"}
        for adjust in (False, True):
            chosen = flat_settings(kind, adjust)
            constants = {"ADJUST": adjust, "SHIFT": chosen["SHIFT"], "BLOCK": block, "TILE": chosen["TILE"]}
            yield Variant(flat_kernel, types, constants, chosen["warps"])

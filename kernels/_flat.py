"""Draws of the entries whose limits few values do not decide: flat distributions, or a large k. One program each.

The thresholds of `_limits.py` are found by bisection, each round a pass over the groups that may matter.
"""

from __future__ import annotations

import torch

from ._draw_parts import OFF, limits_of, pick, store_draw
from ._limits import bound_of, group_keys, list_groups, listed_values
from ._order import LOWEST, ordered
from ._triton import constant, jit, tl
from .entries import ENTRY_WORDS, FLAGS, GREEDY, OWN, POSITION, PROCESSED, ROW, SEED, STREAM, entry_int, entry_long
from .group_stats import fall_rate
from .philox import aimed, uniform_bits
from .scales import value_weight, weigh
from .scratch import GROUP

_GROUP = constant(GROUP)
# What a pass is for: to know whether the groups are enough for top-p, to find the threshold of top-k, to know the mass
# that it leaves, to find the threshold of top-p.
_NOTHING, _GROUPS, _RANK, _MASS, _NUCLEUS = (constant(step) for step in range(5))
_FEWEST = constant(512)  # groups that are tried first for top-p
_INFINITY = constant(float("inf"))


@jit
def flat_kernel(
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
    stride: tl.tensor,
    vocab: tl.tensor,
    groups: tl.tensor,
    words: tl.tensor,
    ADJUST: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """For the entries whose token is negative. scratch: int32 [P, words >= BLOCK]."""
    which, count = tl.program_id(0), tl.num_programs(0)
    if tl.load(tokens + which) < 0:
        entry = entries + which * ENTRY_WORDS
        flags = entry_int(entry, FLAGS)
        row = logits + entry_int(entry, ROW).to(tl.int64) * stride
        first = (which + tl.where((flags & OWN) != 0, count, 0)).to(tl.int64) * groups
        best, temperature = tl.load(floats + 3 * count + which), tl.load(floats + 4 * count + which)
        bits = uniform_bits(entry_long(entry, SEED), entry_long(entry, STREAM), entry_int(entry, POSITION))
        token, value, kept, floor = _draw_of_many(
            (row, vocab, entry, cells, table_bits, capacity),
            top + first,
            mass + first,
            groups,
            best,
            temperature,
            (flags & GREEDY) != 0,
            bits,
            scratch + which.to(tl.int64) * words,
            ADJUST,
            SHIFT,
            BLOCK,
            TILE,
        )
        model_best, model_log_scale = tl.load(floats + which), tl.load(log_scales + which)
        out = (logprobs, floats, log_scales, scale_bads)
        model = (row, model_best, model_log_scale)
        tl.store(tokens + which, token.to(tl.int64))
        store_draw(out, token, value, model, (flags & PROCESSED) != 0, False, best, temperature, kept, floor)


@jit
def _draw_of_many(
    source: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    groups: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    greedy: tl.tensor,
    bits: tl.tensor,
    scratch: tl.tensor,
    ADJUST: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The token (int32), its value, the mass that is kept (int64), the smallest value kept; whatever the limits.

    tops, masses: pointers to the records of the entry. scratch: int32 [BLOCK].
    """
    top_k, top_p, min_floor = limits_of(source[2], best, source[1])
    rate = fall_rate(temperature)
    least = tl.maximum(ordered(min_floor), LOWEST + 1)
    low = least
    keys = group_keys(tops, groups, BLOCK)
    target = top_k.to(tl.float64)
    if top_k < OFF:  # k tops are k values
        low = bound_of(keys, best, top_k, top_k + top_k // 4 + 16) >> SHIFT << SHIFT
        low = tl.where(top_p < 1.0, low, tl.maximum(low, least))
    else:
        _, _, _, weights = weigh(tops, masses, groups, temperature, BLOCK // _GROUP)
        target = top_p * tl.sum(weights, 0).to(tl.float64)
    count = list_groups(keys >= low, scratch, BLOCK)
    end = (ordered(best) >> SHIFT).to(tl.int64) + 1
    low, high = (low >> SHIFT).to(tl.int64), end
    size = _FEWEST // 4
    seeking = tl.where(top_k < OFF, _RANK, tl.where(top_p < 1.0, _GROUPS, _NOTHING))
    while seeking != _NOTHING:
        enough = False
        if seeking == _GROUPS:
            size *= 4
            keys = group_keys(tops, groups, BLOCK)
            bound = tl.maximum(bound_of(keys, best, size - size // 4, size) >> SHIFT << SHIFT, least)
            tl.debug_barrier()
            count = list_groups(keys >= bound, scratch, BLOCK)
            low, enough = (bound >> SHIFT).to(tl.int64), bound == least
        # Three pivots a pass; where only the mass from `low` on is asked for they are all the same.
        width = tl.where((seeking == _RANK) | (seeking == _NUCLEUS), high - low, 0)
        pivots = low + (width + 3) // 4, low + (width + 1) // 2, low + width * 3 // 4
        one, two, three = _masses_from(pivots, seeking == _RANK, source, scratch, count, best, rate, ADJUST, SHIFT, TILE)
        if seeking == _GROUPS:
            seeking = tl.where((one >= target) | enough, _NUCLEUS, _GROUPS)
        elif seeking == _MASS:
            target = top_p * one
            seeking = _NUCLEUS
        else:
            first, second, third = pivots
            high = tl.where(three >= target, high, tl.where(two >= target, third, tl.where(one >= target, second, first)))
            low = tl.where(three >= target, third, tl.where(two >= target, second, tl.where(one >= target, first, low)))
            if high - low <= 1:
                high = end
                seeking = tl.where((seeking == _RANK) & (top_p < 1.0), _MASS, _NOTHING)
    low = tl.maximum(low.to(tl.int32) << SHIFT, least)
    token, value, mass, floor = _draw_from(low, source, scratch, count, best, rate, greedy, bits, ADJUST, BLOCK, TILE)
    return token, value, mass, floor


@jit
def _masses_from(
    pivots: tl.tensor,
    ranking: tl.tensor,
    source: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    ADJUST: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """float64: the mass of the values in the groups listed whose keys are at least each of three; their number if `ranking`."""
    first, second, third = pivots
    one = tl.zeros([TILE, _GROUP], tl.int64)
    two, three = one, one
    for begin in range(0, count, TILE):
        _, x = listed_values(source, listed, begin, count, TILE, ADJUST)
        key = ordered(x) >> SHIFT
        weight = tl.where(ranking, 1, value_weight(x, best, rate))
        one += tl.where(key >= first.to(tl.int32), weight, 0)
        two += tl.where(key >= second.to(tl.int32), weight, 0)
        three += tl.where(key >= third.to(tl.int32), weight, 0)
    one, two, three = tl.sum(one, 1), tl.sum(two, 1), tl.sum(three, 1)
    return tl.sum(one, 0).to(tl.float64), tl.sum(two, 0).to(tl.float64), tl.sum(three, 0).to(tl.float64)


@jit
def _draw_from(
    low: tl.tensor,
    source: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    greedy: tl.tensor,
    bits: tl.tensor,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A draw among the values in the groups listed whose keys are at least `low`; results as of `_draw_of_many`."""
    tile = tl.arange(0, BLOCK // TILE)
    masses = tl.zeros([BLOCK // TILE], tl.int64)
    winner = tl.full([], BLOCK, tl.int32)  # where the tile begins that holds the first of the best
    smallest = tl.full([TILE, _GROUP], _INFINITY, tl.float32)
    for begin in range(0, count, TILE):
        _, x = listed_values(source, listed, begin, count, TILE, ADJUST)
        kept = ordered(x) >= low
        smallest = tl.where(kept, tl.minimum(smallest, x), smallest)
        masses += tl.where(tile == begin // TILE, tl.sum(tl.sum(tl.where(kept, value_weight(x, best, rate), 0), 1), 0), 0)
        winner = tl.where(tl.max(tl.max(x, 1), 0) == best, tl.minimum(winner, begin), winner)
    mass = tl.sum(masses, 0)
    aim = aimed(bits, mass)
    passed = tl.cumsum(masses, 0) <= aim
    begin = tl.where(greedy, winner, tl.sum(passed.to(tl.int32), 0) * TILE)
    group, x = listed_values(source, listed, begin, count, TILE, ADJUST)
    weight = tl.where(ordered(x) >= low, value_weight(x, best, rate), 0)
    weight = tl.where(greedy, (x == best).to(tl.int64), weight)
    aim -= tl.sum(tl.where(passed, masses, 0), 0)
    token, value = pick(weight, group, x, tl.where(greedy, 0, aim), TILE)
    return token, value, mass, tl.min(tl.min(smallest, 1), 0)


def settings(kind: torch.dtype, adjusted: bool) -> dict[str, int]:
    """How the kernel is launched for logits of a type: TILE (groups per step of a pass), SHIFT and warps.

    Values that are adjusted take more registers.
    """
    if adjusted:
        return {"SHIFT": 0, "TILE": 32, "warps": 8}
    # Low bits of the keys that say nothing: of a 16-bit type they are all 0, or all 1 where the value is negative.
    return {"SHIFT": {torch.bfloat16: 16, torch.float16: 13}.get(kind, 0), "TILE": 64, "warps": 16}

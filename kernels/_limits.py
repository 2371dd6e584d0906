"""What top-k, top-p and min-p leave of one entry's distribution, and a draw from it, by one program.

A value is kept if fewer than k values are larger, if those larger hold less than p of the mass that k left, and if it
is no smaller than the floor of min-p: thresholds on the value, so that every tie of it stays. Masses are integers.

`draw_of_few` reads the groups with the largest tops, as many as fit one tile: all values from some bound on. It compares
the values that reach the bound each with each, and knows whether they decide. `draw_of_many` needs no such luck: it
finds the thresholds by bisection, each round a pass over the groups that may matter.
"""

from __future__ import annotations

from ._order import LOWEST, ordered, threshold, unordered
from ._triton import constant, jit, tl
from .adjusted import group_values
from .philox import aimed
from .scales import value_weight
from .scratch import GROUP

_GROUP = constant(GROUP)
FEW = constant(64)  # groups that one tile holds
_USUAL = constant(40)  # groups that are read at least, where there are so many
_SLICE = constant(16)  # values compared with all candidates at a time
_TILE = constant(16)  # groups per step of a pass over many
# What a pass over many groups is for: to know whether they are enough for top-p, to find the threshold of top-k, to know
# the mass that it leaves, to find the threshold of top-p.
_NOTHING, _GROUPS, _RANK, _MASS, _NUCLEUS = (constant(step) for step in range(5))
OFF = constant((1 << 31) - 1)  # as top_k
_INFINITY = constant(float("inf"))
_MINUS_INFINITY = constant(-8388608)  # its bits


@jit
def draw_of_few(
    source: tl.tensor,
    tops: tl.tensor,
    groups: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    total: tl.tensor,
    limits: tl.tensor,
    bits: tl.tensor,
    scratch: tl.tensor,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Whether the few decide, and if so: token (int32), its value, the mass that is kept (int64), the smallest value kept."""
    top_k, top_p, min_floor = limits
    keys = ordered(tops)
    most = tl.where(groups * _GROUP <= CANDIDATES, groups, tl.minimum(FEW, groups - groups // 4))
    n = tl.minimum(tl.where((top_k > _USUAL) & (top_k < FEW), top_k, _USUAL), most)
    bound = _bound(keys, best, n, most)
    count = _list_groups(keys >= bound, scratch, BLOCK)
    group, x = _listed_values(source, scratch, 0, tl.minimum(count, FEW), FEW, ADJUST)
    # The candidates, in the order of their ids.
    ids, values = scratch + BLOCK, scratch + BLOCK + CANDIDATES
    chosen = (ordered(x) >= bound).to(tl.int32)
    counts = tl.sum(chosen, 1)
    place = (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(chosen, 1) - chosen
    held = tl.sum(counts, 0)
    fits = (chosen != 0) & (place < CANDIDATES)
    tl.store(ids + place, group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :], mask=fits)
    tl.store(values + place, x.to(tl.int32, bitcast=True), mask=fits)
    tl.debug_barrier()
    lane = tl.arange(0, CANDIDATES)
    v = tl.load(values + lane, mask=lane < held, other=_MINUS_INFINITY).to(tl.float32, bitcast=True)
    weight = value_weight(v, best, rate)
    rank, above = _larger(values, tl.minimum(held, CANDIDATES), v, best, rate, CANDIDATES)
    complete = bound == LOWEST + 1
    by_rank = (rank < top_k) & (lane < held)
    ranked = (held >= top_k) | complete | (top_k == OFF)
    if top_k < OFF:
        total = tl.sum(tl.where(by_rank, weight, 0), 0)
    target = top_p * total.to(tl.float64)
    massive = (top_p >= 1.0) | (tl.sum(weight, 0).to(tl.float64) >= target) | complete
    # A threshold that lies below the bound is of no matter where min-p's is above it, unless top-p needs its mass.
    floored = (min_floor >= unordered(bound)) & (ranked | (top_p >= 1.0))
    limited = (top_k < OFF) | (top_p < 1.0)
    decided = (count <= FEW) & (held <= CANDIDATES) & (floored | complete | (limited & ranked & massive))
    by_mass = (above == 0) | (above.to(tl.float64) < tl.where(top_p < 1.0, target, _INFINITY))
    kept = by_rank & by_mass & (v >= min_floor)
    weight = tl.where(kept, weight, 0)
    mass = tl.sum(weight, 0)
    aim = aimed(bits, mass)
    drawn = tl.minimum(tl.sum((tl.cumsum(weight, 0) <= aim).to(tl.int32), 0), CANDIDATES - 1)
    floor = tl.min(tl.where(kept, v, _INFINITY), 0)
    return decided, tl.load(ids + drawn), tl.load(values + drawn).to(tl.float32, bitcast=True), mass, floor


@jit
def draw_of_many(
    source: tl.tensor,
    tops: tl.tensor,
    groups: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    total: tl.tensor,
    limits: tl.tensor,
    bits: tl.tensor,
    scratch: tl.tensor,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The token (int32), its value, the mass that is kept (int64), the smallest value kept; whatever the limits.

    tops: pointer to those of the entry: they are read again rather than held in registers all along.
    """
    top_k, top_p, min_floor = limits
    keys = _group_keys(tops, groups, BLOCK)
    least = tl.maximum(ordered(min_floor), LOWEST + 1)
    low = least
    if top_k < OFF:  # k tops are k values
        low = _bound(keys, best, top_k, top_k + top_k // 4 + 16)
        low = tl.where(top_p < 1.0, low, tl.maximum(low, least))
    count = _list_groups(keys >= low, scratch, BLOCK)
    low, end = low.to(tl.int64), ordered(best).to(tl.int64) + 1
    high = end
    size = FEW * 2
    target = tl.where(top_k < OFF, top_k.to(tl.float64), top_p * total.to(tl.float64))
    seeking = tl.where(top_k < OFF, _RANK, tl.where(top_p < 1.0, _GROUPS, _NOTHING))
    while seeking != _NOTHING:
        if seeking == _GROUPS:
            size *= 4
            keys = _group_keys(tops, groups, BLOCK)
            bound = tl.maximum(_bound(keys, best, size - size // 4, size), least)
            count = _list_groups(keys >= bound, scratch, BLOCK)
            low = bound.to(tl.int64)
        # Three pivots a pass; where only the mass from `low` on is asked for they are all the same.
        width = tl.where((seeking == _RANK) | (seeking == _NUCLEUS), high - low, 0)
        first, second, third = low + (width + 3) // 4, low + (width + 1) // 2, low + width * 3 // 4
        one, two, three = _masses_from(first, second, third, seeking == _RANK, source, scratch, count, best, rate, ADJUST)
        if seeking == _GROUPS:
            seeking = tl.where((one >= target) | (low == least), _NUCLEUS, _GROUPS)
        elif seeking == _MASS:
            target = top_p * one
            seeking = _NUCLEUS
        else:
            high = tl.where(three >= target, high, tl.where(two >= target, third, tl.where(one >= target, second, first)))
            low = tl.where(three >= target, third, tl.where(two >= target, second, tl.where(one >= target, first, low)))
            if high - low <= 1:
                high = end
                seeking = tl.where((seeking == _RANK) & (top_p < 1.0), _MASS, _NOTHING)
    low = tl.maximum(low.to(tl.int32), least)
    token, value, mass, floor = _draw_from(low, source, scratch, count, best, rate, bits, ADJUST, BLOCK)
    return token, value, mass, floor


@jit
def _group_keys(tops: tl.tensor, groups: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """int32 [BLOCK]: the keys of the tops at a pointer."""
    group = tl.arange(0, BLOCK)
    return ordered(tl.load(tops + group, mask=group < groups, other=-_INFINITY))


@jit
def _bound(keys: tl.tensor, best: tl.tensor, n: tl.tensor, most: tl.tensor) -> tl.tensor:
    """A key that `n` to `most` of the keys [N] reach, more where many are equal; all but empty groups' where they are few."""
    near, middle, far = ordered(best - 8.0), ordered(best - 16.0), ordered(best - 32.0)
    counts = (keys > LOWEST).to(tl.int64) + ((keys >= far).to(tl.int64) << 16)
    counts += ((keys >= middle).to(tl.int64) << 32) + ((keys >= near).to(tl.int64) << 48)
    counts = tl.sum(counts, 0)
    everything, within_far, within_middle, within_near = (
        counts & 0xFFFF,
        (counts >> 16) & 0xFFFF,
        (counts >> 32) & 0xFFFF,
        counts >> 48,
    )
    low, held = tl.full([], LOWEST + 1, tl.int32), everything
    if everything > most:
        held = tl.where(within_near >= n, within_near, tl.where(within_middle >= n, within_middle, within_far))
        low = tl.where(within_near >= n, near, tl.where(within_middle >= n, middle, far))
        low, held = tl.where(held >= n, low, LOWEST + 1), tl.where(held >= n, held, everything)
    return threshold(keys, low, held, n, most)


@jit
def _list_groups(chosen: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Writes the numbers of the groups chosen, bool [BLOCK], to int32 `out` in order. Returns how many they are."""
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.debug_barrier()
    tl.store(out + place, tl.arange(0, BLOCK), mask=chosen)
    tl.debug_barrier()
    return tl.sum(chosen.to(tl.int32), 0)


@jit
def _listed_values(
    source: tl.tensor, listed: tl.tensor, first: tl.tensor, count: tl.tensor, N: tl.constexpr, ADJUST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """N groups of a list of `count` from the first on, int32 [N], and their values [N, GROUP], -inf past the end."""
    row, vocab, entry, cells, table_bits, capacity = source
    slot = first + tl.arange(0, N)
    group = tl.load(listed + slot, mask=slot < count, other=0)
    x = group_values(row, group, slot < count, vocab, entry, cells, table_bits, capacity, 0.0, 0.0, ADJUST, False)
    return group, x


@jit
def _larger(
    values: tl.tensor, count: tl.tensor, v: tl.tensor, best: tl.tensor, rate: tl.tensor, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Of `count` values (bits at `values`), those larger than each of v [N]: their number (int32) and their mass (int64)."""
    rank, above = tl.zeros([N], tl.int32), tl.zeros([N], tl.int64)
    for first in range(0, count, _SLICE):
        lane = first + tl.arange(0, _SLICE)
        other = tl.load(values + lane, mask=lane < count, other=_MINUS_INFINITY).to(tl.float32, bitcast=True)
        larger = other[:, None] > v[None, :]
        rank += tl.sum(larger.to(tl.int32), 0)
        above += tl.sum(tl.where(larger, value_weight(other, best, rate)[:, None], 0), 0)
    return rank, above


@jit
def _masses_from(
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    ranking: tl.tensor,
    source: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    ADJUST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """float64: the mass of the values in the groups listed whose keys are at least each of three; their number if `ranking`."""
    one = tl.zeros([_TILE, _GROUP], tl.int64)
    two, three = one, one
    for begin in range(0, count, _TILE):
        _, x = _listed_values(source, listed, begin, count, _TILE, ADJUST)
        key = ordered(x)
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
    bits: tl.tensor,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A draw among the values in the groups listed whose keys are at least `low`; results as of `draw_of_many`."""
    tile = tl.arange(0, BLOCK // _TILE)
    masses = tl.zeros([BLOCK // _TILE], tl.int64)
    smallest = tl.full([_TILE, _GROUP], _INFINITY, tl.float32)
    for first in range(0, count, _TILE):
        _, x = _listed_values(source, listed, first, count, _TILE, ADJUST)
        kept = ordered(x) >= low
        smallest = tl.where(kept, tl.minimum(smallest, x), smallest)
        masses += tl.where(tile == first // _TILE, tl.sum(tl.sum(tl.where(kept, value_weight(x, best, rate), 0), 1), 0), 0)
    mass = tl.sum(masses, 0)
    aim = aimed(bits, mass)
    passed = tl.cumsum(masses, 0) <= aim
    first = tl.sum(passed.to(tl.int32), 0) * _TILE
    group, x = _listed_values(source, listed, first, count, _TILE, ADJUST)
    weight = tl.where(ordered(x) >= low, value_weight(x, best, rate), 0)
    aim -= tl.sum(tl.where(passed, masses, 0), 0)
    token, value = pick(weight, group, x, aim, _TILE)
    return token, value, mass, tl.min(tl.min(smallest, 1), 0)


@jit
def pick(weight: tl.tensor, group: tl.tensor, x: tl.tensor, aim: tl.tensor, N: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The first token of groups [N] in order at which their cumulative weight, int64 [N, GROUP], exceeds `aim`, and its value."""
    sums = tl.sum(weight, 1)
    cumulative = (tl.cumsum(sums, 0) - sums)[:, None] + tl.cumsum(weight, 1)
    place = tl.sum(tl.sum((cumulative <= aim).to(tl.int32), 1), 0)
    lane = tl.arange(0, N)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    here = lane == tl.minimum(place, N * _GROUP - 1)
    token = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    value = tl.max(tl.max(tl.where(here, x, -_INFINITY), 1), 0)
    return tl.sum(tl.sum(tl.where(here, token, 0), 1), 0), value

"""What top-k, top-p and min-p leave of one entry's distribution, and a draw from it, among few candidates in one program.

A value is kept if fewer than k values are larger, if those larger hold less than p of the mass that k left, and if it
is no smaller than the floor of min-p: thresholds on the value, so that every tie of it stays. Masses are integers.

`draw_of_few` reads the groups with the largest tops, FEW at most: all values from some bound on. It compares
the values that reach the bound each with each, and knows whether they decide. Where they don't, `_flat.py` draws.
"""

from __future__ import annotations

from ._draw_parts import OFF, limits_of
from ._order import LOWEST, ordered, threshold, unordered
from ._triton import constant, jit, tl
from .adjusted import group_values
from .philox import aimed
from .scales import value_weight
from .scratch import GROUP

_GROUP = constant(GROUP)
FEW = constant(64)  # groups that are read at most
_STEP = constant(32)  # groups read at once: more would take more registers than two programs find
_ADJUSTED_STEP = constant(16)  # of 32, Triton 3.6 can't gather adjusted values in 16 warps
_USUAL = constant(40)  # groups that are read at least, where there are so many
_SLICE = constant(16)  # values compared with all candidates at a time
_INFINITY = constant(float("inf"))
_NOTHING = constant(-8388608 << 32)  # a pair of -inf and token 0


@jit
def draw_of_few(
    source: tl.tensor,
    tops: tl.tensor,
    groups: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    total: tl.tensor,
    greedy: tl.tensor,
    bits: tl.tensor,
    scratch: tl.tensor,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Whether the few decide, and if so: token (int32), its value, the mass that is kept (int64), the smallest value kept.

    tops: pointer to those of the entry. scratch: int64 [FEW + CANDIDATES], of this program alone.
    """
    _, vocab, entry, _, _, _ = source
    top_k = limits_of(entry, best, vocab)[0]
    keys = group_keys(tops, groups, BLOCK)
    most = tl.where(groups * _GROUP <= CANDIDATES, groups, tl.minimum(FEW, groups - groups // 4))
    n = tl.minimum(tl.where((top_k > _USUAL) & (top_k < FEW), top_k, _USUAL), most)
    bound = bound_of(keys, best, n, most)
    count = list_groups(keys >= bound, scratch, FEW)
    pairs = scratch + FEW
    held = _list_candidates(source, scratch, tl.minimum(count, FEW), bound, pairs, ADJUST, CANDIDATES)
    lane = tl.arange(0, CANDIDATES)
    v = _pair_value(tl.load(pairs + lane, mask=lane < held, other=_NOTHING))
    top_k, top_p, min_floor = limits_of(entry, best, vocab)  # read again rather than held in registers
    weight = value_weight(v, best, rate)
    rank, above = _larger(pairs, tl.minimum(held, CANDIDATES), v, best, rate, CANDIDATES)
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
    aim = tl.where(greedy, 0, aimed(bits, mass))
    weight = tl.where(greedy, (v == best).to(tl.int64), weight)
    drawn = tl.minimum(tl.sum((tl.cumsum(weight, 0) <= aim).to(tl.int32), 0), CANDIDATES - 1)
    pair = tl.load(pairs + drawn)
    return decided, pair.to(tl.int32), _pair_value(pair), mass, tl.min(tl.where(kept, v, _INFINITY), 0)


@jit
def group_keys(tops: tl.tensor, groups: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """int32 [BLOCK]: the keys of the tops at a pointer."""
    group = tl.arange(0, BLOCK)
    return ordered(tl.load(tops + group, mask=group < groups, other=-_INFINITY))


@jit
def bound_of(keys: tl.tensor, best: tl.tensor, n: tl.tensor, most: tl.tensor) -> tl.tensor:
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
def list_groups(chosen: tl.tensor, out: tl.tensor, most: tl.tensor) -> tl.tensor:
    """Writes the numbers of the groups chosen, bool [N], to `out` in order, `most` at most. Returns how many are chosen."""
    one = chosen.to(tl.int32)
    place = tl.cumsum(one, 0) - 1
    tl.store(out + place, tl.arange(0, chosen.shape[0]), mask=chosen & (place < most))
    tl.debug_barrier()
    return tl.sum(one, 0)


@jit
def listed_values(
    source: tl.tensor, listed: tl.tensor, first: tl.tensor, count: tl.tensor, N: tl.constexpr, ADJUST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """N groups of a list of `count` from the first on, int32 [N], and their values [N, GROUP], -inf past the end."""
    row, vocab, entry, cells, table_bits, capacity = source
    slot = first + tl.arange(0, N)
    group = tl.load(listed + slot, mask=slot < count, other=0).to(tl.int32)
    x = group_values(row, group, slot < count, vocab, entry, cells, table_bits, capacity, 0.0, 0.0, ADJUST, False)
    return group, x


@jit
def _list_candidates(
    source: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    bound: tl.tensor,
    pairs: tl.tensor,
    ADJUST: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """Writes the values of the groups listed that reach `bound`, with their tokens, in order. Returns their number."""
    STEP: tl.constexpr = _ADJUSTED_STEP if ADJUST else _STEP
    held = tl.full([], 0, tl.int32)
    for first in range(0, count, STEP):
        group, x = listed_values(source, listed, first, count, STEP, ADJUST)
        chosen = (ordered(x) >= bound).to(tl.int32)
        counts = tl.sum(chosen, 1)
        place = held + (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(chosen, 1) - chosen
        token = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        pair = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | token.to(tl.int64)
        tl.store(pairs + place, pair, mask=(chosen != 0) & (place < CANDIDATES))
        held += tl.sum(counts, 0)
    tl.debug_barrier()
    return held


@jit
def _pair_value(pair: tl.tensor) -> tl.tensor:
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _larger(
    pairs: tl.tensor, count: tl.tensor, v: tl.tensor, best: tl.tensor, rate: tl.tensor, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Of the values of `count` pairs, those larger than each of v [N]: their number (int32) and their mass (int64)."""
    rank, above = tl.zeros([N], tl.int32), tl.zeros([N], tl.int64)
    for first in range(0, count, _SLICE):
        lane = first + tl.arange(0, _SLICE)
        other = _pair_value(tl.load(pairs + lane, mask=lane < count, other=_NOTHING))
        larger = other[:, None] > v[None, :]
        rank += tl.sum(larger.to(tl.int32), 0)
        above += tl.sum(tl.where(larger, value_weight(other, best, rate)[:, None], 0), 0)
    return rank, above

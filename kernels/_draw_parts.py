"""Parts of the kernels of `draw`: limits of an entry, a token by its cumulative weight, and what is written of a draw."""

from __future__ import annotations

from ._order import ordered, unordered
from ._triton import constant, jit, tl
from .adjusted import group_values
from .entries import MIN_P_DEPTH, TOP_K, TOP_P, entry_double, entry_int
from .group_stats import fall_rate
from .philox import aimed
from .scales import group_weights, log_scale_of, store_scale, value_weight
from .scratch import GROUP

OFF = constant((1 << 31) - 1)  # as top_k
_GROUP = constant(GROUP)
_INFINITY = constant(float("inf"))


@jit
def limits_of(entry: tl.tensor, best: tl.tensor, vocab: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """top_k (OFF where off), top_p (float64, 1 where off), and the smallest fp32 value that passes min-p (-inf where off)."""
    top_k = entry_int(entry, TOP_K)
    top_k = tl.where((top_k > 0) & (top_k < vocab), top_k, OFF)
    exact = best.to(tl.float64) + entry_double(entry, MIN_P_DEPTH)
    floor = exact.to(tl.float32)
    next_floor = unordered(ordered(floor) + 1)
    floor = tl.where(floor.to(tl.float64) < exact, next_floor, floor)
    return top_k, entry_double(entry, TOP_P), tl.where(exact == exact, floor, -_INFINITY)


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


@jit
def store_draw(
    out: tl.tensor,
    token: tl.tensor,
    value: tl.tensor,
    model: tl.tensor,
    processed: tl.tensor,
    bad: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    mass: tl.tensor,
    floor: tl.tensor,
) -> None:
    """The log-prob of a token and the distribution it was drawn from, of which `mass` is kept, for the entry of this program.

    model: pointer to the row, its best value and the log-prob of that: what the log-prob is of unless `processed`.
    """
    logprobs, floats, log_scales, bads = out
    row, model_best, model_log_scale = model
    log_scale = log_scale_of(mass)
    store_scale(floats, log_scales, bads, 1, bad, best, temperature, log_scale, floor)
    depth = tl.div_rn(value - best, temperature)
    if processed == 0:
        log_scale = model_log_scale
        depth = tl.load(row + token).to(tl.float32) - model_best
    logprob = (depth.to(tl.float64) + log_scale).to(tl.float32)
    tl.store(logprobs + tl.program_id(0), tl.where(bad, 0.0, logprob))


@jit
def draw_from_all(
    source: tl.tensor,
    records: tl.tensor,
    best: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    total: tl.tensor,
    greedy: tl.tensor,
    bits: tl.tensor,
    ADJUST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A token (int32) and its value, where nothing is filtered out: the best one where `greedy`, the lowest id of ties.

    records: pointers to tops and masses, groups, temperature. tops, weights: what `weigh` says of them, total: the sum.
    """
    row, vocab, entry, cells, table_bits, capacity = source
    top, mass, groups, temperature = records
    # Of all groups 64, of these one, of its tokens one.
    chosen, aim = _choose(tops, weights, best, aimed(bits, total), greedy)
    group = chosen * _GROUP + tl.arange(0, _GROUP)
    tops = tl.load(top + group, mask=group < groups, other=-_INFINITY)
    masses = tl.load(mass + group, mask=group < groups, other=0)
    weights = group_weights(tops, masses, best, temperature)
    inner, aim = _choose(tops, weights, best, aim, greedy)
    share = aim.to(tl.float64) / tl.sum(tl.where(tl.arange(0, _GROUP) == inner, weights, 0), 0).to(tl.float64)
    group = chosen * _GROUP + inner + tl.zeros([1], tl.int32)
    x = group_values(row, group, group < groups, vocab, entry, cells, table_bits, capacity, 0.0, 0.0, ADJUST, False)
    group_top = tl.max(tl.max(x, 1), 0)
    # What is left to aim at within the group, in its own finer weights; the best one is where its weights begin to count.
    weight = tl.where(greedy, (x == group_top).to(tl.int64), value_weight(x, group_top, fall_rate(temperature)))
    inside = tl.sum(tl.sum(weight, 1), 0)
    inner = tl.minimum((share * inside.to(tl.float64)).to(tl.int64), inside - 1)
    token, value = pick(weight, group, x, tl.where(greedy, 0, inner), 1)
    return token, value


@jit
def _choose(
    tops: tl.tensor, weights: tl.tensor, best: tl.tensor, aim: tl.tensor, greedy: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The first of N places where the cumulative weight exceeds `aim`, or that has the best top; and what `aim` is beyond it."""
    count: tl.constexpr = tops.shape[0]
    passed = tl.cumsum(weights, 0) <= aim
    place = tl.sum(tl.where(greedy, tl.cumsum((tops == best).to(tl.int32), 0) == 0, passed).to(tl.int32), 0)
    return tl.minimum(place, count - 1), aim - tl.sum(tl.where(passed, weights, 0), 0)

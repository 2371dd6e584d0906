"""The best of many values within one program: a threshold by bisection, a list of what passes it, and its order.

Values are compared as `ordered` keys, int32 in the order of the floats. Equal ones stand in the order of their index.
"""

from __future__ import annotations

from ._triton import constant, jit, tl
from .scratch import GROUP

LOWEST = constant(-2139095041)  # the key of -inf
NOTHING = constant(-(1 << 31))  # below the keys of all values
EMPTY = constant(-(1 << 63))  # below all that is packed of values
_LOW_32 = constant(0xFFFFFFFF)
_SLICE = constant(32)
_GROUP = constant(GROUP)


@jit
def ordered(x: tl.tensor) -> tl.tensor:
    """int32 keys of fp32 values; -0.0 counts as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def unordered(key: tl.tensor) -> tl.tensor:
    """The fp32 values of int32 keys."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def threshold(keys: tl.tensor, low: tl.tensor, held: tl.tensor, n: tl.tensor, most: tl.tensor) -> tl.tensor:
    """An int32 key that `n` to `most` of the keys [N] reach; the n-th largest where that is equal to too many.

    low: a key that `held` of them reach, and no fewer than `n` where `held` is above `most`. Smaller ones never count.
    """
    low = low.to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64) + 1  # fewer than n reach it
    held = held.to(tl.int64)
    while (held > most) & (high - low > 1):
        # Three pivots a round: a reduction is mostly latency, and one sum carries three counts.
        width = high - low
        first, second, third = low + (width + 3) // 4, low + (width + 1) // 2, low + width * 3 // 4
        counts = (keys >= first.to(tl.int32)).to(tl.int64)
        counts += (keys >= second.to(tl.int32)).to(tl.int64) << 21
        counts += (keys >= third.to(tl.int32)).to(tl.int64) << 42
        counts = tl.sum(counts, 0)
        one, two, three = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
        high = tl.where(one < n, first, tl.where(two < n, second, tl.where(three < n, third, high)))
        low = tl.where(three >= n, third, tl.where(two >= n, second, tl.where(one >= n, first, low)))
        held = tl.where(three >= n, three, tl.where(two >= n, two, tl.where(one >= n, one, held)))
    return low.to(tl.int32)


@jit
def listed(keys: tl.tensor, low: tl.tensor, most: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Places [N] in a list of the keys [N] above `low` and the first of those equal to it, `most` at most; -1 for the others.

    And how many are listed. The list is in the order of the keys' index. N: a multiple of 32, below 2^15.
    """
    above, equal = (keys > low).to(tl.int32), (keys == low).to(tl.int32)
    both = above + (equal << 16)
    # By rows: a running sum over all at once takes what every warp has of it through each thread's registers.
    lines = tl.reshape(both, [keys.shape[0] // _SLICE, _SLICE])
    each = tl.sum(lines, 1)
    before = tl.reshape((tl.cumsum(each, 0) - each)[:, None] + tl.cumsum(lines, 1), [keys.shape[0]]) - both
    total = tl.sum(both, 0)
    room = most - (total & 0xFFFF)
    place = (before & 0xFFFF) + tl.minimum(before >> 16, room)
    in_list = (above != 0) | ((equal != 0) & ((before >> 16) < room))
    return tl.where(in_list, place, -1), (total & 0xFFFF) + tl.minimum(total >> 16, room)


@jit
def chosen_groups(
    key: tl.tensor, low: tl.tensor, scratch: tl.tensor, n: tl.tensor, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Groups int32 [N], in order, that hold the n best tokens; how many they are; and a key that all n best reach.

    key: int32 [BLOCK], of the largest value of each group; smaller ones than `low` never count. n <= N. scratch: int64 [N].
    """
    held = tl.sum((key >= low).to(tl.int32), 0)
    low = threshold(key, low, held, n, N)
    place, found = listed(key, low, N)
    tl.store(scratch + place, tl.arange(0, key.shape[0]), mask=place >= 0)
    tl.debug_barrier()
    lane = tl.arange(0, N)
    return tl.load(scratch + lane, mask=lane < found, other=0).to(tl.int32), found, low


@jit
def listed_token(index: tl.tensor, groups: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """int64 [M]: the tokens at places [M] of a tile [N, GROUP] of the groups that `chosen_groups` left at `groups`."""
    group = tl.load(groups + index // _GROUP, mask=valid, other=0)
    return group * _GROUP + index % _GROUP


@jit
def best_places(key: tl.tensor, low: tl.tensor, n: tl.tensor, most: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """As `listed`, for keys [L] that may be among the n best, `most` at most. Smaller keys than `low` never count."""
    held = tl.sum((key >= low).to(tl.int32), 0)
    place, count = listed(key, threshold(key, low, held, n, most), most)
    return place, count


@jit
def packed(key: tl.tensor, index: tl.tensor) -> tl.tensor:
    """int64 that is larger the larger the key, and of equal keys the lower the index, 0 <= index < 2^32."""
    return (key.to(tl.int64) << 32) | (index.to(tl.int64) ^ _LOW_32)


@jit
def store_packed(pairs: tl.tensor, place: tl.tensor, key: tl.tensor, index: tl.tensor) -> None:
    """Writes the packed keys and indices [L] to int64 `pairs`, each at its place, where that is not negative."""
    # As halves: pairs of int64 registers for a whole tile are many.
    half = pairs.to(tl.pointer_type(tl.int32)) + 2 * place
    tl.store(half, ~index, mask=place >= 0)
    tl.store(half + 1, key, mask=place >= 0)


@jit
def packed_key(pair: tl.tensor) -> tl.tensor:
    return (pair >> 32).to(tl.int32)


@jit
def packed_index(pair: tl.tensor) -> tl.tensor:
    """int64."""
    return (pair & _LOW_32) ^ _LOW_32


@jit
def ranks(pair: tl.tensor, pairs: tl.tensor, count: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """int32 [N]: how many of the `count` int64 at `pairs` are larger than each of pair [N]. N: a multiple of 32."""
    rank = tl.zeros([N], tl.int32)
    for begin in range(0, N, _SLICE):
        lane = begin + tl.arange(0, _SLICE)
        other = tl.load(pairs + lane, mask=lane < count, other=EMPTY)
        rank += tl.sum((other[None, :] > pair[:, None]).to(tl.int32), 1)
    return rank

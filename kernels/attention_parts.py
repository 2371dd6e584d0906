"""What attention knows of some of a token's keys, and how it becomes one result.

Partial results ("sums") are relative to the largest score among their keys, in base 2: the weighted sum of values fp32
[R, m], the largest score [R], and the sum of weights [R]. They are always joined in the order of their keys, so that a
result has the same bits whoever joins them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ._rounding import rounded
from ._triton import Variant, constant, jit, launch, power_of_two, tl

_LOG2_E = constant(math.log2(math.e))
_BURST = constant(4)  # partial results that are read at once
_HEADS = 8  # of a program that merges


def merge_parts(partial: Tensor, state: Tensor, part: Tensor, sinks: Tensor | None, out: Tensor) -> None:
    """Writes the results of tokens with partial results, and zeros for padding, to out [N, H, m].

    partial: fp32 [P, H, m]; state: fp32 [P, H, 2], largest scores and weights; part: int32 [N + 1], token t has the
    partial results part[t] .. part[t + 1] - 1, and is padding where part[t + 1] is -1. sinks: fp32 [H].
    """
    n, heads, size = out.shape
    constants = {"HAS_SINKS": sinks is not None, "SIZE": size, "WIDTH": power_of_two(size, 16), "HEADS": _HEADS}
    launch(_merge, (n, -(-heads // _HEADS)), partial, state, part, sinks, out, heads, **constants)


@jit
def joined(sums: tl.tuple, more: tl.tuple) -> tl.tuple:
    """Partial results and those of later keys as one."""
    highest = tl.maximum(sums[1], more[1])
    level = tl.where(highest == -float("inf"), 0.0, highest)
    fade, more_fade = tl.exp2(sums[1] - level), tl.exp2(more[1] - level)
    values = sums[0] * fade[:, None] + more[0] * more_fade[:, None]
    return values, highest, sums[2] * fade + more[2] * more_fade


@jit
def completed(sums: tl.tuple, sink: tl.tensor, HAS_SINKS: tl.constexpr) -> tl.tensor:
    """Results [R, m] of all keys; `sink` [R] is one more score, of no value."""
    values, peak, total = sums
    if HAS_SINKS:
        sink *= _LOG2_E
        highest = tl.maximum(peak, sink)
        level = tl.where(highest == -float("inf"), 0.0, highest)
        fade = tl.exp2(peak - level)
        values *= fade[:, None]
        total = total * fade + tl.exp2(sink - level)
    return values / tl.where(total > 0, total, 1.0)[:, None]


@jit(changing=("part",))
def _merge(
    partial: tl.tensor,
    state: tl.tensor,
    part: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    HAS_SINKS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """HEADS heads of a token."""
    token = tl.program_id(0)
    begin, end = tl.load(part + token), tl.load(part + token + 1)
    if begin != end or end < 0:
        head, width = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
        held = head < heads
        mask = held[:, None] & (width < SIZE)[None, :]
        nothing = tl.full((HEADS,), -float("inf"), tl.float32)
        sums = tl.zeros((HEADS, WIDTH), tl.float32), nothing, tl.zeros((HEADS,), tl.float32)
        for first in range(begin, end, _BURST):
            for i in tl.static_range(_BURST):
                place = (begin.to(tl.int64) + (first + i - begin)) * heads + head
                here = held & (place < end.to(tl.int64) * heads)
                to = partial + place[:, None] * SIZE + width[None, :]
                values = tl.load(to, mask=here[:, None] & (width < SIZE)[None, :], other=0.0)
                peak = tl.load(state + place * 2, mask=here, other=-float("inf"))
                sums = joined(sums, (values, peak, tl.load(state + place * 2 + 1, mask=here, other=0.0)))
        sink = tl.load(sinks + head, mask=held, other=0.0) if HAS_SINKS else 0.0
        to = out + (token.to(tl.int64) * heads + head)[:, None] * SIZE + width[None, :]
        tl.store(to, rounded(completed(sums, sink, HAS_SINKS), out.dtype.element_ty), mask=mask)


def variants() -> Iterator[Variant]:
    for name in ("*bf16", "*fp16", "*fp32"):
        types = {"partial": "*fp32", "state": "*fp32", "part": "*i32", "sinks": "*fp32", "out": name, "heads": "i32"}
        for sinks in (False, True):
            yield Variant(_merge, types, {"HAS_SINKS": sinks, "SIZE": 256, "WIDTH": 256, "HEADS": _HEADS})

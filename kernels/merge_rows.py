"""The best (row, token) pairs of every search, exactly ordered, from the records of groups: score down, row up, token up.

    score[r, t] = fp32(bias[r] + logprob[r, t])

Rounding keeps order, so the n best pairs lie in the n groups of a search whose best pairs come first. Narrow searches
take two launches: one program per row puts its n best pairs in order, one per search merges its rows'. Those of many
rows or many pairs go through `merge_wide`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._order import (
    EMPTY,
    LOWEST,
    best_places,
    chosen_groups,
    listed_token,
    packed,
    packed_index,
    packed_key,
    ranks,
    store_packed,
    unordered,
)
from ._reading import check_reading, plain_entries
from ._scored import Rows, argument_types, empty_results, scored_groups, top_keys
from ._triton import Variant, constant, jit, launch, power_of_two, tl
from .best_tokens import MAX_BEST
from .distribution import Scale
from .entries import ENTRY_WORDS, ROW, entry_int
from .group_stats import GroupStats, group_stats
from .merge_wide import merge_wide
from .scales import model_scale, own_scale
from .scratch import GROUP
from .token_table import TokenTable
from .upload import upload

MERGED_AT_ONCE = 8192  # pairs that one program merges
_FEWEST = 32
_REGISTERS = 128  # of a thread that merges rows: what 16 warps can have
_GROUP = constant(GROUP)


class Merged(NamedTuple):
    """The best pairs of each group, [G, n]; where fewer are possible, parent and token are -1, the others -inf."""

    parent: Tensor  # int64, the row
    token: Tensor  # int64
    score: Tensor  # fp32
    logprob: Tensor  # fp32


def check_groups(offsets: Sequence[int], rows: int, n: int) -> None:
    """Raises ValueError unless n >= 1 and `offsets` cut P = `rows` rows into groups."""
    if n < 1:
        raise ValueError(f"n={n} is refused: it must be >= 1")
    if not len(offsets) or (offsets[0], offsets[-1]) != (0, rows) or any(a > b for a, b in itertools.pairwise(offsets)):
        raise ValueError(f"offsets must ascend from 0 to {rows}, the number of rows, not {list(offsets)}")


def merge_rows(
    logits: Tensor,
    entries: Tensor,
    stats: GroupStats,
    table: TokenTable | None,
    bias: Tensor,
    offsets: Sequence[int],
    n: int,
    *,
    processed: bool,
    scale: Scale | None = None,
) -> Merged:
    """The n best pairs (entry, token) of each group of entries by bias + log-prob; ties to the lower entry, then token.

    logits: floating [U, V]; entries: int32 [P, WORDS]; table: None where no entry is ADJUSTED; bias: fp32 [P], at most finite;
    offsets: as in `beam_merge`. Bans, bias and penalties apply to the model's log-probs, which are not normalised again; stats
    are then those of `adjust_stats` with that scale as `log_probs`. If `processed`, they apply to logits, at temperature 1,
    and stats are those of plain `adjust_stats`. scale: that of the model's or the own distributions [P], if it is known.
    An entry whose distribution is bad is impossible as a whole. Raises ValueError for other shapes, and unless n >= 1.
    """
    check_reading(logits, entries, stats, None)
    check_groups(offsets, len(entries), n)
    if bias.shape != (len(entries),) or bias.dtype != torch.float32:
        raise ValueError(f"bias must be float32 [{len(entries)}], not {bias.dtype} {list(bias.shape)}")
    if scale is None:
        scale = own_scale(stats, entries) if processed else model_scale(stats)
    return _merge(Rows(logits, entries, stats, scale, bias.contiguous(), table, processed), offsets, n)


def merge_log_probs(logprobs: Tensor, bias: Tensor, offsets: Sequence[int], n: int) -> Merged:
    """As `beam_merge`, whose checks are the caller's."""
    rows, device = len(logprobs), logprobs.device
    logprobs = logprobs if logprobs.stride(1) == 1 else logprobs.contiguous()
    entries = plain_entries(rows, device)
    stats = group_stats(logprobs, entries, False)
    zeros = torch.zeros(rows, dtype=torch.float64, device=device)
    dead = ~torch.isfinite(stats.top[0].amax(-1))
    scale = Scale(dead, zeros.float(), zeros, zeros, zeros)  # log-probs as they are
    return _merge(Rows(logprobs, entries, stats, scale, bias.contiguous(), None, False), offsets, n)


def _merge(rows: Rows, offsets: Sequence[int], n: int) -> Merged:
    widest = max((end - begin for begin, end in itertools.pairwise(offsets)), default=0)
    if n > MAX_BEST or widest * n > MERGED_AT_ONCE:
        return Merged(*merge_wide(rows, offsets, n))
    return _narrow(rows, offsets, n, widest)


def _narrow(rows: Rows, offsets: Sequence[int], n: int, widest: int) -> Merged:
    count, searches, device = len(rows.entries), len(offsets) - 1, rows.logits.device
    width = power_of_two(n, _FEWEST)
    pairs = torch.empty(count, n, dtype=torch.int64, device=device)
    logprobs = torch.empty(count, n, dtype=torch.float32, device=device)
    scratch = torch.empty(max(count, searches), 3 * width, dtype=torch.int64, device=device)
    kept = torch.empty(count, width * GROUP, dtype=torch.float32, device=device)
    block = power_of_two(rows.stats.top.shape[2], _FEWEST)
    launch(
        _rows_kernel, (count,), *rows.arguments(), scratch, kept, pairs, logprobs, n,
        **rows.flags(), BLOCK=block, N=width, warps=_warps(width), registers=_REGISTERS,
    )  # fmt: skip
    # Only page-locked memory is copied without waiting.
    cuts = upload(np.array(offsets, np.int32), device)
    out = empty_results((searches, n), device)
    block = power_of_two(widest * n, 2 * _FEWEST)
    launch(
        _searches_kernel, (searches,), pairs, logprobs, cuts, scratch, *out, n,
        BLOCK=block, N=width, warps=_search_warps(block),
    )  # fmt: skip
    return Merged(*out)


def _warps(width: int) -> int:
    return 16 if width > 32 else 8


def _search_warps(block: int) -> int:
    return 16 if block > 4096 else 8 if block > 512 else 4


@jit(changing=("bad", "best", "log_scales", "bias", "n"))
def _rows_kernel(
    logits: tl.tensor,
    entries: tl.tensor,
    tops: tl.tensor,
    bad: tl.tensor,
    best: tl.tensor,
    log_scales: tl.tensor,
    bias: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    scratch: tl.tensor,
    kept: tl.tensor,
    pairs: tl.tensor,
    logprobs: tl.tensor,
    n: tl.tensor,
    ADJUST: tl.constexpr,
    OWNED: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """The n best pairs of one entry, in order: packed (key of the score, token), and the log-probs."""
    index = tl.program_id(0)
    entry = entries + index * ENTRY_WORDS
    row = logits + entry_int(entry, ROW).to(tl.int64) * stride
    scale = tl.load(bad + index), tl.load(best + index), tl.load(log_scales + index), tl.load(bias + index)
    groups = tl.cdiv(vocab, _GROUP)
    low = tl.full([], LOWEST + 1, tl.int32)  # -inf is impossible
    key = top_keys(tops, index, tl.arange(0, BLOCK), groups, entry, bits, scale, ADJUST, OWNED)
    scratch += index.to(tl.int64) * (3 * N)
    kept += index.to(tl.int64) * (N * _GROUP)
    chosen, found, low = chosen_groups(key, low, scratch + 2 * N, n, N)
    valid = tl.arange(0, N) < found
    logprob, key = scored_groups(row, chosen, valid, vocab, entry, cells, bits, capacity, scale, ADJUST, OWNED)
    tl.store(kept + tl.arange(0, N)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :], logprob)
    key = tl.reshape(key, [N * _GROUP])
    place, held = best_places(key, low, n, 2 * N)
    store_packed(scratch, place, key, tl.arange(0, N * _GROUP))
    tl.debug_barrier()
    lane = tl.arange(0, 2 * N)
    real = lane < held
    pair = tl.load(scratch + lane, mask=real, other=EMPTY)
    place = tl.where(real, ranks(pair, scratch, held, 2 * N), lane)
    source = packed_index(pair)
    token = listed_token(source, scratch + 2 * N, real)
    out = index.to(tl.int64) * n + place
    tl.store(pairs + out, tl.where(real, packed(packed_key(pair), token), EMPTY), mask=place < n)
    tl.store(logprobs + out, tl.load(kept + source, mask=real, other=-float("inf")), mask=place < n)


@jit(changing=("n",))
def _searches_kernel(
    pairs: tl.tensor,
    logprobs: tl.tensor,
    offsets: tl.tensor,
    scratch: tl.tensor,
    parent: tl.tensor,
    token: tl.tensor,
    score: tl.tensor,
    logprob: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """The n best pairs of one search, of those of its entries: equal scores stand in the order of entry and token there."""
    search = tl.program_id(0)
    begin = tl.load(offsets + search)
    first = begin.to(tl.int64) * n
    held = (tl.load(offsets + search + 1) - begin) * n
    lane = tl.arange(0, BLOCK)
    pair = tl.load(pairs + first + lane, mask=lane < held, other=EMPTY)
    key = packed_key(pair)
    place, count = best_places(key, tl.full([], LOWEST + 1, tl.int32), n, 2 * N)
    scratch += search.to(tl.int64) * (2 * N)
    store_packed(scratch, place, key, lane)
    tl.debug_barrier()
    lane = tl.arange(0, 2 * N)
    real = lane < count
    pair = tl.load(scratch + lane, mask=real, other=0)
    place = tl.where(real, ranks(pair, scratch, count, 2 * N), lane)
    source = packed_index(pair)
    out, wanted = search.to(tl.int64) * n + place, place < n
    taken = tl.load(pairs + first + source, mask=real, other=0)
    tl.store(parent + out, tl.where(real, begin + source // n, -1), mask=wanted)
    tl.store(token + out, tl.where(real, packed_index(taken), -1), mask=wanted)
    tl.store(score + out, tl.where(real, unordered(packed_key(pair)), -float("inf")), mask=wanted)
    tl.store(logprob + out, tl.load(logprobs + first + source, mask=real, other=-float("inf")), mask=wanted)


def variants() -> Iterator[Variant]:
    """Every configuration that is launched, for vocabularies of up to 2^18 tokens."""
    outputs = {"scratch": "*i64", "kept": "*fp32", "pairs": "*i64", "logprobs": "*fp32", "n": "i32"}
    for dtype in ("bf16", "fp16", "fp32"):
        for adjust, owned in ((False, False), (True, False), (False, True), (True, True)):
            for block, width in itertools.product((512, 2048, 4096), (32, 64, 128)):
                constants = {"ADJUST": adjust, "OWNED": owned, "BLOCK": block, "N": width}
                yield Variant(_rows_kernel, {**argument_types(dtype), **outputs}, constants, _warps(width), _REGISTERS)
    types = {"pairs": "*i64", "logprobs": "*fp32", "offsets": "*i32", "scratch": "*i64", "parent": "*i64", "token": "*i64"}
    types |= {"score": "*fp32", "logprob": "*fp32", "n": "i32"}
    for block, width in ((64, 32), (512, 32), (1024, 64), (8192, 32), (8192, 128)):
        yield Variant(_searches_kernel, types, {"BLOCK": block, "N": width}, _search_warps(block))

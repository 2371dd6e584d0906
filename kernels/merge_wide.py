"""The best pairs of searches of many rows or many pairs, by selections over packed keys.

A selection among all groups of a search finds the n whose best pairs come first, one among the pairs in these the
result. Keys are int64, a score above its place, so that no two are equal and equal scores stand in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._order import EMPTY, LOWEST, packed, packed_index, packed_key, unordered
from ._scored import Rows, argument_types, empty_results, scored_groups, top_keys
from ._triton import Variant, constant, jit, launch, tl
from .entries import ENTRY_WORDS, ROW, entry_int
from .scratch import GROUP

_BLOCK = 1024  # groups, or pairs, per program
_GROUP = constant(GROUP)


def merge_wide(rows: Rows, offsets: Sequence[int], n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Merged`. Raises ValueError for a search of 2^32 pairs."""
    count, vocab, device = len(rows.entries), rows.logits.shape[1], rows.logits.device
    groups = rows.stats.top.shape[2]
    sizes = [end - begin for begin, end in itertools.pairwise(offsets)]
    if max(sizes, default=0) * vocab >= 1 << 32:
        raise ValueError(f"a search of {max(sizes)} rows of {vocab} tokens is refused: its pairs must be less than 2^32")
    keys = torch.empty(count, groups, dtype=torch.int64, device=device)
    launch(
        _tops_kernel, (count, -(-groups // _BLOCK)), *rows.arguments(), keys, **rows.flags(), BLOCK=_BLOCK
    )  # fmt: skip
    out = empty_results((len(sizes), n), device)
    search = row = 0
    for size, same in itertools.groupby(sizes):
        searches = len(list(same))
        results = tuple(field[search : search + searches] for field in out)
        _merge_equal(rows, keys[row : row + searches * size].view(searches, size * groups), row, size, n, results)
        search, row = search + searches, row + searches * size
    return out


def _merge_equal(rows: Rows, keys: Tensor, first: int, size: int, n: int, out: tuple[Tensor, ...]) -> None:
    """Of searches of `size` rows each from row `first` on. keys: of their groups, [S, size * groups]; out: [S, n] each."""
    searches, device = len(keys), keys.device
    chosen = keys.topk(min(n, keys.shape[1]), sorted=False).values
    pairs = torch.empty(searches, chosen.shape[1] * GROUP, dtype=torch.int64, device=device)
    logprobs = torch.empty(pairs.shape, dtype=torch.float32, device=device)
    launch(
        _pairs_kernel, (chosen.numel(),), *rows.arguments(), chosen, pairs, logprobs, first, max(size, 1), chosen.shape[1],
        **rows.flags(), warps=1,
    )  # fmt: skip
    best, place = pairs.topk(min(n, pairs.shape[1]))
    launch(
        _result_kernel, (searches, -(-n // _BLOCK)), best, place, logprobs, *out,
        first, size, rows.logits.shape[1], best.shape[1], pairs.shape[1], n, BLOCK=_BLOCK,
    )  # fmt: skip


@jit(changing=("bad", "best", "log_scales", "bias"))
def _tops_kernel(
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
    keys: tl.tensor,
    ADJUST: tl.constexpr,
    OWNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Packed (key of the best score, place among all groups of all entries) of every group."""
    index = tl.program_id(0)
    entry = entries + index * ENTRY_WORDS
    scale = tl.load(bad + index), tl.load(best + index), tl.load(log_scales + index), tl.load(bias + index)
    groups = tl.cdiv(vocab, _GROUP)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = top_keys(tops, index, group, groups, entry, bits, scale, ADJUST, OWNED)
    place = index.to(tl.int64) * groups + group
    tl.store(keys + place, packed(key, place), mask=group < groups)


@jit(changing=("bad", "best", "log_scales", "bias", "first", "size", "each"))
def _pairs_kernel(
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
    chosen: tl.tensor,
    pairs: tl.tensor,
    logprobs: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    each: tl.tensor,
    ADJUST: tl.constexpr,
    OWNED: tl.constexpr,
) -> None:
    """Packed (key of the score, row and token in the search) of the pairs in one group, of `each` that a search has."""
    place = tl.program_id(0)
    group_key = tl.load(chosen + place)
    groups = tl.cdiv(vocab, _GROUP)
    index = (packed_index(group_key) // groups).to(tl.int32)
    group = (packed_index(group_key) % groups).to(tl.int32) + tl.zeros([1], tl.int32)
    valid = packed_key(group_key) + tl.zeros([1], tl.int32) > LOWEST
    entry = entries + index * ENTRY_WORDS
    row = logits + entry_int(entry, ROW).to(tl.int64) * stride
    scale = tl.load(bad + index), tl.load(best + index), tl.load(log_scales + index), tl.load(bias + index)
    logprob, key = scored_groups(row, group, valid, vocab, entry, cells, bits, capacity, scale, ADJUST, OWNED)
    token = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    local = index - first - place // each * size
    out = place.to(tl.int64) * _GROUP + tl.arange(0, _GROUP)[None, :]
    tl.store(pairs + out, packed(key, local.to(tl.int64) * vocab + token))
    tl.store(logprobs + out, logprob)


@jit(changing=("parent", "token", "score", "logprob", "first", "size", "held", "pairs", "n"))
def _result_kernel(
    best: tl.tensor,
    places: tl.tensor,
    logprobs: tl.tensor,
    parent: tl.tensor,
    token: tl.tensor,
    score: tl.tensor,
    logprob: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    vocab: tl.tensor,
    held: tl.tensor,
    pairs: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Unpacks the best `held` pairs of a search, of `pairs` that it has."""
    search = tl.program_id(0)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(best + search.to(tl.int64) * held + lane, mask=lane < held, other=EMPTY)
    real = packed_key(pair) > LOWEST
    place = tl.load(places + search.to(tl.int64) * held + lane, mask=real, other=0)
    out = search.to(tl.int64) * n + lane
    wanted = lane < n
    source = packed_index(pair)
    tl.store(parent + out, tl.where(real, first + search * size + source // vocab, -1), mask=wanted)
    tl.store(token + out, tl.where(real, source % vocab, -1), mask=wanted)
    tl.store(score + out, tl.where(real, unordered(packed_key(pair)), -float("inf")), mask=wanted)
    found = tl.load(logprobs + search.to(tl.int64) * pairs + place, mask=real, other=-float("inf"))
    tl.store(logprob + out, found, mask=wanted)


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    for dtype in ("bf16", "fp16", "fp32"):
        for adjust, owned in ((False, False), (True, False), (False, True), (True, True)):
            flags = {"ADJUST": adjust, "OWNED": owned}
            yield Variant(_tops_kernel, {**argument_types(dtype), "keys": "*i64"}, {**flags, "BLOCK": _BLOCK})
            types = {**argument_types(dtype), "chosen": "*i64", "pairs": "*i64", "logprobs": "*fp32"}
            yield Variant(_pairs_kernel, {**types, "first": "i32", "size": "i32", "each": "i32"}, flags, 1)
    types = {"best": "*i64", "places": "*i64", "logprobs": "*fp32", "parent": "*i64", "token": "*i64", "score": "*fp32"}
    types |= {"logprob": "*fp32", **dict.fromkeys(("first", "size", "vocab", "held", "pairs", "n"), "i32")}
    yield Variant(_result_kernel, types, {"BLOCK": _BLOCK})

"""Attention of single tokens over the paged cache, cut into items of (token, fixed stretch of keys).

With the cache laid out as `kv_cache.py` says, both products of an item are weighted sums of contiguous cache rows:
exactly what an embedding bag computes, in place, without gathering keys and values first. Each sum runs over one item's
rows in order, and items of one token come together in order, so that a token's result depends on nothing but its query
and the keys and values it sees. Sums are kept in float32; scores, probabilities and the result of an item are rounded to
the cache's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Array = NDArray[np.int64]

LANES = 32  # torch's reductions give the same bits at any width that is a multiple of this, given zeros at the end


def whole_blocks(keys: int, block_size: int) -> int:
    """`keys` rounded down to whole blocks, at least one."""
    return max(1, keys // block_size) * block_size


class Score(NamedTuple):
    """How products of queries and keys become scores, and how much of the softmax the sinks take."""

    scale: float
    softcap: float | None
    sinks: Tensor | None  # float32 [H]

    def __call__(self, products: Tensor, unseen: Tensor) -> Tensor:
        """float32 scores of `products`; `unseen` is 0, or -inf for keys that are not seen."""
        if self.softcap is None:
            return torch.add(unseen, products, alpha=self.scale)
        return products.float().mul_(self.scale / self.softcap).tanh_().mul_(self.softcap).add_(unseen)


def log_mass(top: Tensor, p: Tensor) -> Tensor:
    """The log-sum-exp of scores, given the largest [...] and their softmax p [..., S]: its share is 1 / sum. Overwrites `top`."""
    return top.sub_(p.amax(-1).log_())


def shares(mass: Tensor, sinks: Tensor | None) -> Tensor:
    """What each of up to M items has in the whole, float32 [..., M]; mass: [..., M], next to nothing where there is none.

    sinks: broadcasts against mass [..., 0]. The sum runs in order, so that items which are not there change no bit.
    """
    if sinks is not None:
        mass = torch.cat((sinks.expand(mass.shape[:-1])[..., None], mass), -1)
    weight = (mass - mass.amax(-1, keepdim=True)).exp_()
    share = weight.div_(weight.cumsum(-1)[..., -1:])
    return share if sinks is None else share[..., 1:]


@dataclass(frozen=True, slots=True)
class Items:
    """W items of at most S keys, for D tokens; P (item, head, block) triples in all."""

    query: Tensor  # [P] rows of the queries
    key_rows: Tensor  # [P * n] rows of the key cache: the components of a block
    key_bags: Tensor  # [W * H * blocks + 1] where each bag of them begins
    unseen: Tensor  # [W, 1, S] float32, -inf for keys that are not seen
    value_rows: Tensor  # [W * H * S] rows of the value cache
    value_bags: Tensor  # [W * H + 1]
    flat: Tensor  # [D] the flat index of each token
    merge: _Merge | None


@dataclass(frozen=True, slots=True)
class _Merge:
    """How the items of a token come together; M is the most items of a token."""

    present: Tensor  # [D, M] which of them a token has
    rows: Tensor  # [W * H] rows of the items' results, token by token and head by head
    bags: Tensor  # [D * H + 1] where those of a token's head begin


class _Cuts(NamedTuple):
    """W items: token `token` (an index of the D tokens) of row `row` sees keys [begin, end) of the stretch at `first`."""

    token: Array
    row: Array
    first: Array
    begin: Array
    end: Array
    number: Array  # [D] items per token


def _cut(row: Array, position: Array, split: int, window: int | None) -> _Cuts:
    """Cuts what each token sees at multiples of `split`, so that the cuts depend on the token alone."""
    low = np.zeros_like(position) if window is None else np.maximum(0, position - window + 1)
    count = position // split - low // split + 1
    token = np.repeat(np.arange(len(row)), count)
    nth = np.arange(len(token)) - np.repeat(np.cumsum(count) - count, count)
    first = (low[token] // split + nth) * split
    begin, end = np.maximum(first, low[token]), np.minimum(first + split, position[token] + 1)
    return _Cuts(token, row[token], first, begin, end, count)


def index_items(
    row: Array,
    position: Array,
    flat: Array,
    tables: NDArray[np.int32],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    split: int,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> Items:
    """Of D >= 1 tokens at `position` of rows `row` of the block tables; `flat` is where their queries are.

    split: the keys of a stretch, whole blocks.
    """
    cuts = _cut(row, position, split, window)
    # An item begins at its first block that is seen, but only at a whole multiple of LANES keys behind its fixed place:
    # so its sums run in the same lanes for any window.
    step = LANES // math.gcd(LANES, block_size)
    column = cuts.first // block_size
    column += (cuts.begin // block_size - column) // step * step
    begin, end = (cuts.begin - column * block_size)[:, None], (cuts.end - column * block_size)[:, None]
    blocks = (end[:, 0] - 1) // block_size + 1
    most = -(-int(blocks.max()) // step) * step
    nth, key = np.arange(most), np.arange(most * block_size)
    # Outside of its keys an item repeats the nearest: they weigh nothing there, and nothing foreign is ever read.
    seen = np.clip(key, begin, end - 1)
    near = np.clip(nth, begin // block_size, (end - 1) // block_size)
    table = tables[cuts.row[:, None], column[:, None] + near].astype(np.int64)
    value_row = np.take_along_axis(table, seen // block_size, 1) * (kv_heads * block_size) + seen % block_size

    def on_device(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    head = torch.arange(heads, device=device)[:, None]
    kv_head = head // (heads // kv_heads)
    present = on_device(nth < blocks[:, None])[:, None].expand(-1, heads, -1)
    query = (on_device(flat[cuts.token])[:, None, None] * heads + head).expand(-1, -1, most)[present]
    key_block = (on_device(table)[:, None] * kv_heads + kv_head)[present]
    unseen = on_device(seen != key)[:, None]
    return Items(
        query=query,
        key_rows=(key_block[:, None] * head_dim + torch.arange(head_dim, device=device)).view(-1),
        key_bags=functional.pad(present.reshape(-1).cumsum(0) * head_dim, (1, 0)),
        unseen=torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -math.inf),
        value_rows=(on_device(value_row)[:, None] + kv_head * block_size).view(-1),
        value_bags=torch.arange(0, len(cuts.row) * heads * len(key) + 1, len(key), device=device),
        flat=on_device(flat),
        merge=_index_merge(cuts.number, heads, device) if (cuts.number > 1).any() else None,
    )


def _index_merge(count: Array, heads: int, device: torch.device | str) -> _Merge:
    present = torch.from_numpy(np.arange(count.max()) < count[:, None]).to(device)
    item = torch.zeros(present.shape, dtype=torch.int64, device=device)
    item[present] = torch.arange(int(count.sum()), device=device)
    rows = item[:, None] * heads + torch.arange(heads, device=device)[:, None]
    bags = functional.pad(torch.from_numpy(np.repeat(count, heads)).to(device).cumsum(0), (1, 0))
    return _Merge(present, rows[present[:, None].expand_as(rows)], bags)


def attend_items(q: Tensor, k_cache: Tensor, v_cache: Tensor, items: Items, score: Score) -> Tensor:
    """[D, H, m] for the D tokens that are cut into items. Arguments as those of `paged_attention`."""
    _, heads, head_dim = q.shape
    size = v_cache.shape[3]
    count, _, width = items.unseen.shape
    weights = q.reshape(-1, head_dim).index_select(0, items.query).view(-1)
    products = _bag_sums(k_cache.view(-1, k_cache.shape[3]), items.key_rows, items.key_bags, weights)
    scores = score(products.view(count, heads, width), items.unseen)
    p = torch.softmax(scores, -1)
    out = _bag_sums(v_cache.view(-1, size), items.value_rows, items.value_bags, p.to(q.dtype).view(-1))
    merge = items.merge
    if merge is None:
        out = out.view(-1, heads, size)
        if score.sinks is None:
            return out
        return out.float().mul_(shares(log_mass(scores.amax(-1), p)[..., None], score.sinks)).to(q.dtype)
    mass = p.new_full((*merge.present.shape, heads), -math.inf)
    mass[merge.present] = log_mass(scores.amax(-1), p)
    share = shares(mass.mT, score.sinks).mT[merge.present]  # [W, H]
    # A product, then a sum of products: one rounding more than in one go, and the same on every path.
    weighted = out.float().mul_(share.view(-1, 1))
    return _bag_sums(weighted, merge.rows, merge.bags, None).to(q.dtype).view(-1, heads, size)


def _bag_sums(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor | None) -> Tensor:
    """out[b] = sum of weights[i] * table[rows[i]] over bags[b] <= i < bags[b + 1]."""
    return functional.embedding_bag(rows, table, bags, mode="sum", per_sample_weights=weights, include_last_offset=True)

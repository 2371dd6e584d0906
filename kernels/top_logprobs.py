"""The most probable tokens of a row, exactly ordered: by logit, ties to the lower id."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import native_sampling as native
from ._arguments import check_logits
from ._reading import plain_entries
from ._triton import fused
from .best_tokens import MAX_BEST, best_tokens
from .distribution import Distribution
from .group_stats import group_stats
from .groups import find_best, grouped
from .scales import model_scale
from .scratch import GROUP, Scratch, thread_scratch, widened


class TopLogprobs(NamedTuple):
    ids: Tensor  # int64 [B, n], -1 past the vocabulary
    logprobs: Tensor  # fp32 [B, n], -inf past the vocabulary


def top_logprobs(logits: Tensor, n: int) -> TopLogprobs:
    """The n most probable tokens of each row of [B, V] and their log-probs, descending, ties to the lower id.

    n may exceed V: the rest is padded with id -1, log-prob -inf. Rows that are NaN, or nothing but -inf, mean nothing.
    Raises ValueError for a negative n.
    """
    check_logits(logits)
    if n < 0:
        raise ValueError(f"n={n} is refused: it must be >= 0")
    if fused(logits) and 0 < n <= MAX_BEST:
        return _of_groups(logits, n)
    if native.takes(logits) and not fused(logits):
        given = native.entries(logits, np.arange(len(logits)))
        _, best = native.read(logits, given, thread_scratch(logits.device), token=False, n=n)
        return TopLogprobs(best.ids.long(), best.logp)
    scratch = Scratch()
    dist = Distribution(widened(logits, scratch), None, scratch)
    ids = best_ids(dist.values, min(n, logits.shape[1]))
    logprobs = dist.scale().log_probs(dist.values.gather(-1, ids))
    return TopLogprobs(padded(ids, n, -1), padded(logprobs, n, -torch.inf))


def _of_groups(logits: Tensor, n: int) -> TopLogprobs:
    """By the kernels that read records of groups."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    entries = plain_entries(len(logits), logits.device)
    stats = group_stats(logits, entries, False)
    ids, values = best_tokens(logits, entries, stats, None, n, impossible=True)
    return TopLogprobs(ids, model_scale(stats).log_probs(values))


def padded(values: Tensor, n: int, fill: float) -> Tensor:
    """`values` [B, m] with columns of `fill` appended up to n."""
    return torch.nn.functional.pad(values, (0, n - values.shape[1]), value=fill)


def best_ids(values: Tensor, n: int) -> Tensor:
    """The ids of the n <= W largest values of each row of fp32 [B, W]: int64 [B, n], descending, ties to the lower id."""
    if n == 0:
        return torch.empty(len(values), 0, dtype=torch.int64, device=values.device)
    depth = min(n + 1, values.shape[1])
    whole = values.shape[1] % GROUP == 0 and values.is_contiguous()
    best, ids = find_best(values, grouped(values).amax(-1), depth) if whole else values.topk(depth)
    best_n, ids = best[:, :n], ids[:, :n]
    ids, order = ids.sort(-1)
    ids = ids.gather(-1, best_n.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    torn = best[:, n - 1] == best[:, n] if best.shape[1] > n else best.new_zeros(len(best), dtype=torch.bool)
    if bool(torn.any()):  # topk took any of the ties at its end
        ids[torn] = _best_ids_of_ties(values[torn], n)
    return ids


def _best_ids_of_ties(values: Tensor, n: int) -> Tensor:
    """As `best_ids`, by one integer key per entry: its value in the order of its bits, then its id, reversed."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reverse = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    key = (ordered.long() << 32) | reverse
    return values.shape[1] - 1 - (key.topk(n).values & 0xFFFFFFFF)


def token_rank(values: Tensor, token: Tensor, scratch: Scratch) -> Tensor:
    """1 + the number of entries strictly larger than the token's, int64 [B]. values: fp32 [B, W], token: int64 [B]."""
    larger = torch.gt(values, values.gather(-1, token[:, None]), out=scratch.like("mask", values))
    return larger.view(len(values), -1, GROUP).sum(-1).sum(-1, dtype=torch.float64).long() + 1

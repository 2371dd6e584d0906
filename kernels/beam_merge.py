"""The best (sequence, token) pairs of every search: the read-out of beam search.

    score[r, t] = bias[r] + logprob[r, t], rounded to fp32;  best n of all rows of a group: score down, row up, token up

One pass over the rows finds the largest value of every run of GROUP tokens. The n best pairs lie in the n runs whose
best pairs come first: a pair outside of them comes after all n of those. So n runs of a group are gathered, and the
pairs in them ordered. Rows may come in slices; the best pairs so far of a group that is cut compete with the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import native_sampling as native
from ._arguments import check_logits
from ._triton import fused
from .distribution import Scale
from .merge_rows import Merged, check_groups, merge_log_probs
from .scratch import GROUP, Scratch, chunks, thread_scratch, widened
from .top_logprobs import best_ids, padded

__all__ = ["Merge", "Merged", "beam_merge"]


def beam_merge(logprobs: Tensor, bias: Tensor, offsets: Sequence[int], n: int) -> Merged:
    """The n best pairs (row, token) of each group of rows by bias + log-prob; ties to the lower row, then the lower token.

    logprobs: floating [P, V], -inf is impossible; a row that has NaN or +inf is impossible as a whole. bias: fp32 [P],
    at most finite. offsets: [G+1] from 0 to P, ascending; group g has the rows offsets[g] .. offsets[g+1]. Raises
    ValueError for other shapes, and unless n >= 1; what a bias on a CUDA device holds is not looked at.
    """
    check_logits(logprobs)
    rows = len(logprobs)
    if bias.shape != (rows,) or bias.dtype != torch.float32 or not (bias.is_cuda or bool((bias < torch.inf).all())):
        raise ValueError(f"bias must be float32 [{rows}] without NaN or +inf, not {bias.dtype} {list(bias.shape)}")
    if fused(logprobs):
        check_groups(offsets, rows, n)
        return merge_log_probs(logprobs, bias, offsets, n)
    if native.takes(logprobs):
        check_groups(offsets, rows, n)
        return _native(logprobs, bias, offsets, n)
    merge = Merge(offsets, rows, n, logprobs.device)
    scratch = Scratch()
    for cut in chunks(rows, logprobs.shape[1], logprobs.device):
        merge.add(widened(logprobs[cut], scratch), bias[cut])
    return merge.result()


def _native(logprobs: Tensor, bias: Tensor, offsets: Sequence[int], n: int) -> Merged:
    given = native.entries(logprobs, np.arange(len(logprobs)))
    given["flags"] = native.AS_LOGP
    pairs = native.merge(logprobs, given, bias.contiguous(), offsets, n, thread_scratch(logprobs.device))
    return Merged(pairs.parent.long(), pairs.token.long(), pairs.score, pairs.logp)


class _Pairs(NamedTuple):
    """Pairs of some groups, [M, n], best first."""

    score: Tensor
    logprob: Tensor
    row: Tensor
    token: Tensor

    def best(self, n: int) -> _Pairs:
        """The n best of them, in order; of ties the first stays first."""
        ids = best_ids(self.score, min(n, self.score.shape[1]))
        return _Pairs(*(field.gather(-1, ids) for field in self))


class Merge:
    """Takes the rows of all groups slice by slice, in order."""

    def __init__(self, offsets: Sequence[int], rows: int, n: int, device: torch.device) -> None:
        """As in `beam_merge`; rows: P. Raises ValueError."""
        check_groups(offsets, rows, n)
        self._offsets, self._n, self._device = offsets, n, device
        self._first = 0  # row of the next slice
        self._group = 0  # the first group that it may belong to
        self._found: list[tuple[list[int], _Pairs]] = []  # groups that ended, and their pairs
        self._open: _Pairs | None = None  # the pairs so far of the group that a slice cut

    def add(self, values: Tensor, bias: Tensor, scale: Scale | None = None) -> None:
        """The next rows: fp32 [p, W], W a multiple of GROUP; bias: fp32 [p].

        Log-probs, or logits of which `scale` makes log-probs. What they are need not outlive the call.
        """
        rows = _Rows(values, bias, scale, self._n)
        begin, end = self._first, self._first + len(values)
        parts: list[tuple[int, int, int]] = []  # group, first row, row after the last
        while self._group < len(self._offsets) - 1 and self._offsets[self._group] < end:
            first, last = (min(max(self._offsets[self._group + i], begin), end) for i in range(2))
            if last > first:
                parts.append((self._group, first - begin, last - begin))
            if self._offsets[self._group + 1] > end:
                break
            self._group += 1
        self._first = end
        if parts and self._open is not None:
            self._join(parts.pop(0), rows, begin, end)
        if parts and self._offsets[parts[-1][0] + 1] > end:
            self._open = rows.best([parts.pop()[1:]], begin)
        for same in _by_size(parts).values():
            self._found.append(([group for group, _, _ in same], rows.best([part[1:] for part in same], begin)))

    def _join(self, part: tuple[int, int, int], rows: _Rows, begin: int, end: int) -> None:
        """More rows of the group that was cut."""
        assert self._open is not None
        group, *span = part
        more = rows.best([(span[0], span[1])], begin)
        joined = _Pairs(*(torch.cat(pair, -1) for pair in zip(self._open, more, strict=True))).best(self._n)
        self._open = joined
        if self._offsets[group + 1] <= end:
            self._found.append(([group], joined))
            self._open = None

    def result(self) -> Merged:
        """When all rows are added."""
        shape = len(self._offsets) - 1, self._n
        score = torch.full(shape, -torch.inf, device=self._device)
        logprob = score.clone()
        parent, token = (torch.full(shape, -1, dtype=torch.int64, device=self._device) for _ in range(2))
        for groups, pairs in self._found:
            where = torch.tensor(groups, device=self._device)
            possible = pairs.score > -torch.inf
            score[where] = padded(pairs.score, self._n, -torch.inf)
            logprob[where] = padded(pairs.logprob.masked_fill(~possible, -torch.inf), self._n, -torch.inf)
            parent[where] = padded(pairs.row.masked_fill(~possible, -1), self._n, -1)
            token[where] = padded(pairs.token.masked_fill(~possible, -1), self._n, -1)
        return Merged(parent, token, score, logprob)


class _Rows:
    """A slice of rows, as runs of GROUP tokens."""

    def __init__(self, values: Tensor, bias: Tensor, scale: Scale | None, n: int) -> None:
        self.runs = values.view(len(values), -1, GROUP)  # [p, R, GROUP]
        self.bias, self.scale, self.n = bias, scale, n
        tops = self.runs.amax(-1)
        self.dead = ~torch.isfinite(tops.amax(-1))
        if scale is not None:  # rounding keeps the order, so the best of a run stays the best
            tops = scale.log_probs(tops)
        self.tops = tops.add_(bias[:, None]).masked_fill_(self.dead[:, None], -torch.inf)  # scores [p, R]

    def best(self, spans: list[tuple[int, int]], first: int) -> _Pairs:
        """The best pairs of spans (begin, end) of rows of similar length, [M, n]. first: number of the first row of all."""
        device, count = self.tops.device, self.runs.shape[1]
        begin, end = torch.tensor(spans, device=device).T[..., None]
        rows = begin + torch.arange(int((end - begin).amax()), device=device)  # [M, L]
        past = rows >= end
        rows.clamp_(max=len(self.tops) - 1)
        tops = self.tops[rows].masked_fill_(past[..., None], -torch.inf).view(len(spans), -1)
        chosen = best_ids(tops, min(self.n, tops.shape[1])).sort(-1).values  # in order, so that ties stay in order
        row, run = rows.gather(-1, chosen // count), chosen % count  # [M, k]
        gone = self.dead[row] | past.gather(-1, chosen // count)
        values = self.runs[row, run]
        if self.scale is not None:
            values = self.scale.pick(row.view(-1)).log_probs(values.view(-1, GROUP)).view_as(values)
        score = (values + self.bias[row][..., None]).masked_fill_(gone[..., None], -torch.inf).view(len(spans), -1)
        ids = best_ids(score, min(self.n, score.shape[1]))
        return _Pairs(
            score.gather(-1, ids),
            values.view(len(spans), -1).gather(-1, ids),
            row.gather(-1, ids // GROUP) + first,
            run.gather(-1, ids // GROUP) * GROUP + ids % GROUP,
        )


def _by_size(parts: list[tuple[int, int, int]]) -> dict[int, list[tuple[int, int, int]]]:
    """Parts of groups whose sizes round up to the same power of two, so that little padding makes them one tensor."""
    out: dict[int, list[tuple[int, int, int]]] = {}
    for part in parts:
        out.setdefault((part[2] - part[1] - 1).bit_length(), []).append(part)
    return out

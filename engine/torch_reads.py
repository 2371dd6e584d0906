"""The read-outs of a probe in torch: on a CPU, and on any device for what the fused kernels leave aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.distribution import Scale
from pagefork.kernels.filters import GREEDY
from pagefork.kernels.philox import uniform
from pagefork.kernels.sample import choose
from pagefork.kernels.top_logprobs import best_ids, padded
from pagefork.scheduler.plan import Bools, Ints, Kind, Probe

from .logit_parts import Part, Parts, joined, kept
from .merge import read_merge
from .pending import Columns
from .slot_state import SlotState


class _Seen(NamedTuple):
    """What SAMPLE found out about the rows of this step, so that TOPN of the same rows needs no search of its own."""

    logits: Tensor
    entry: Ints  # [max_slots], index of a slot's entry below, -1 for none
    position: NDArray[Any]  # [P]
    shaped: Bools  # [P], where `processed` means anything
    model: Scale
    processed: Scale


class TorchReads:
    """Reads logits part by part, as they fit the cache."""

    def __init__(self, state: SlotState, vocab_size: int, device: torch.device) -> None:
        self._state, self._vocab_size, self._device = state, vocab_size, device
        self._parts = Parts(state, vocab_size, device)
        self._tensor = self._parts.tensor
        self._seen: _Seen | None = None
        self._readers: dict[Kind, Callable[[Tensor, Probe, Tensor, NDArray[Any]], Columns]] = {
            Kind.SAMPLE: self._sample,
            Kind.TOPN: self._top,
            Kind.MERGE: lambda *given: read_merge(self._parts, *given),
            Kind.TARGET: self._target,
        }

    def read(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        """As in Sampler.read."""
        return self._readers[probe.kind](logits, probe, self._tensor(row), position)

    def forget(self) -> None:
        """What was found of the logits so far is not that of the logits to come."""
        self._seen = None

    def _sample(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> Columns:
        fields, parts = self._state.fields[probe.slot], self._parts
        greedy, ranked = fields["temperature"] < GREEDY, fields["rank"]
        shaped = ~greedy | fields["processed"]  # rows whose processed distribution matters
        keys = map(self._tensor, (fields["seed"], fields["stream"], position + 1))
        number = torch.empty(len(greedy), device=self._device) if greedy.all() else uniform(*keys)
        found: list[tuple[Tensor, ...]] = []
        scales: list[tuple[Scale, Scale]] = []
        for cut, part in parts.cut(logits, probe.slot, index, position):
            model, dist = parts.distributions(part, shaped[cut])
            token = choose(dist, self._tensor(greedy[cut]), number[cut])
            processed = dist.scale() if shaped[cut].any() else model
            bad = model.bad | dist.bad
            token.masked_fill_(bad, 0)
            logp = parts.log_probs(part, model, processed, token[:, None])[:, 0].masked_fill_(bad, 0.0)
            rank = parts.ranks(part, token) if ranked[cut].any() else torch.zeros_like(token)
            found.append((token, logp, rank, bad, bad & ~model.bad))
            scales.append((model, processed))
        token, logp, rank, bad, emptied = map(torch.cat, zip(*found, strict=True))
        self._remember(logits, probe.slot, position, shaped, scales)
        rank.masked_fill_(self._tensor(~ranked), 0)
        return {"bad": bad, "token": token.int(), "logp": logp, "rank": rank.int(), "emptied": emptied}

    def _top(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> Columns:
        """The most probable tokens by the log-probs that are reported, or by the processed probability."""
        parts, n, fields = self._parts, min(probe.n, self._vocab_size), self._state.fields[probe.slot]
        shaped, ranked = fields["processed"] | probe.processed, fields["rank"] & probe.processed
        known = self._recall(logits, probe.slot, position, shaped)
        found: list[tuple[Tensor, ...]] = []
        for cut, part in parts.cut(logits, probe.slot, index, position, shaped):
            model, processed = self._scales(part, shaped[cut]) if known is None else (scale.pick(cut) for scale in known)
            bad = torch.where(self._tensor(shaped[cut]), processed.bad, model.bad)
            ids = best_ids(kept(part, processed) if probe.processed else parts.ordered(part, processed), n)
            logp = parts.log_probs(part, model, processed, ids)
            chance = processed.log_probs(part.adjusted.gather(-1, ids)).exp_() if probe.processed else logp
            if probe.processed:  # that nothing is left is an answer: no token has a chance
                bad = bad & (chance[:, 0] != 0)
            rank = self._all_ranks(part, ids) if ranked[cut].any() else torch.zeros_like(ids)
            found.append((bad | model.bad, bad & ~model.bad, ids, logp, chance, rank))
        bad, emptied, ids, logp, chance, rank = map(torch.cat, zip(*found, strict=True))
        if probe.processed:
            hopeless = chance == 0
            for values, fill in ((ids, -1), (logp, -torch.inf), (rank, 0)):
                values.masked_fill_(hopeless, fill)
        columns = {
            "bad": bad,
            "top_id": padded(ids, probe.n, -1).int(),
            "top_logp": padded(logp, probe.n, -torch.inf),
            "emptied": emptied,
        }
        if probe.processed:
            columns["top_p"] = padded(chance, probe.n, 0.0)
        if ranked.any():
            rank.masked_fill_(self._tensor(~ranked)[:, None], 0)
            columns["top_rank"] = padded(rank, probe.n, 0).int()
        return columns

    def _target(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> Columns:
        """Log-prob and rank of given tokens, and the most probable ones at their places."""
        assert probe.target is not None
        target, wanted = self._tensor(probe.target).long(), self._state.fields["processed"][probe.slot]
        parts, n = self._parts, min(probe.n, self._vocab_size)
        found: list[tuple[Tensor, ...]] = []
        for cut, part in parts.cut(logits, probe.slot, index, position, wanted):
            model, processed = self._scales(part, wanted[cut])
            bad = torch.where(self._tensor(wanted[cut]), processed.bad, model.bad)
            ids = torch.cat((target[cut, None], best_ids(parts.ordered(part, processed), n)), -1)
            logp = parts.log_probs(part, model, processed, ids)
            found.append((bad, bad & ~model.bad, parts.ranks(part, target[cut]), ids, logp))
        bad, emptied, rank, ids, logp = map(torch.cat, zip(*found, strict=True))
        return {
            "bad": bad,
            "logp": logp[:, 0],
            "rank": rank.int(),
            "top_id": padded(ids[:, 1:], probe.n, -1).int(),
            "top_logp": padded(logp[:, 1:], probe.n, -torch.inf),
            "emptied": emptied,
        }

    def _scales(self, part: Part, shaped: Bools) -> tuple[Scale, Scale]:
        """Of the model's distribution, and of the processed one where `shaped`."""
        model, dist = self._parts.distributions(part, shaped)
        return model, dist.scale() if shaped.any() else model

    def _all_ranks(self, part: Part, ids: Tensor) -> Tensor:
        """int64 [p, n] of ids [p, n]."""
        return torch.stack([self._parts.ranks(part, column) for column in ids.unbind(-1)], -1)

    def _remember(
        self, logits: Tensor, slot: Ints, position: NDArray[Any], shaped: Bools, scales: list[tuple[Scale, Scale]]
    ) -> None:
        entry = np.full(len(self._state.fields), -1, np.int32)
        entry[slot] = np.arange(len(slot))
        model, processed = (joined(list(parts)) for parts in zip(*scales, strict=True))
        self._seen = _Seen(logits, entry, position, shaped, model, processed)

    def _recall(self, logits: Tensor, slot: Ints, position: NDArray[Any], shaped: Bools) -> tuple[Scale, Scale] | None:
        """The scales of these entries, the processed ones where `shaped`, if SAMPLE of this step found them all."""
        if self._seen is None or self._seen.logits is not logits:
            return None
        entry = self._seen.entry[slot]
        missing = (entry < 0) | (self._seen.position[entry] != position) | (shaped & ~self._seen.shaped[entry])
        if missing.any():
            return None
        return self._seen.model.pick(self._tensor(entry)), self._seen.processed.pick(self._tensor(entry))

"""Reads logits: draws tokens and looks up the most probable ones, for the probes of a plan.

Log-probs are the model's own (before bans, bias, penalties and temperature) unless a spec asks for the processed
distribution.
"""

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
from pagefork.scheduler.plan import Bools, Forks, Ints, Kind, Opens, Probe, Reads, Rows, Spec

from .custom_logits import LogitsProcessors
from .logit_parts import Part, Parts, joined, kept
from .merge import read_merge
from .slot_state import SlotState


class _Seen(NamedTuple):
    """What SAMPLE found out about the rows of this step, so that TOPN of the same rows needs no search of its own."""

    logits: Tensor
    entry: Ints  # [max_slots], index of a slot's entry below, -1 for none
    position: NDArray[Any]  # [P]
    shaped: Bools  # [P], where `processed` means anything
    model: Scale
    processed: Scale


class Sampler:
    """The state by slot that reading logits needs, and the read-outs."""

    def __init__(self, max_slots: int, vocab_size: int, max_len: int, device: torch.device) -> None:
        self.last = torch.zeros(max_slots, dtype=torch.int64, device=device)  # the token drawn last; 0 after a bad row
        self.processors = LogitsProcessors(vocab_size)
        self._state = SlotState(max_slots, vocab_size, max_len, device, self.processors)
        self._parts = Parts(self._state, vocab_size, device)
        self._tensor = self._parts.tensor
        self._vocab_size, self._device = vocab_size, device
        self._seen: _Seen | None = None
        # Reads, and which entries are bad though the model's logits are good.
        self._readers: dict[Kind, Callable[[Tensor, Probe, Tensor, NDArray[Any]], tuple[Reads, Tensor]]] = {
            Kind.SAMPLE: self._sample,
            Kind.TOPN: self._top,
            Kind.MERGE: lambda *given: read_merge(self._parts, *given),
            Kind.TARGET: self._target,
        }

    def fork(self, forks: Forks) -> None:
        """Slots become copies of others, all but the stream; every source is read before any slot is written."""
        self._state.fork(forks)
        self.last[self._tensor(forks.dst)] = self.last[self._tensor(forks.src)]

    def open(self, opens: Opens, specs: list[Spec]) -> None:
        """Slots start afresh. Raises ValueError for a token id outside of the vocabulary."""
        self._state.open(opens, specs)

    def feed(self, rows: Rows, tokens: Tensor) -> None:
        """Takes the tokens, int64 [T], that this step feeds; before its logits are read."""
        self._seen = None
        self._state.feed(rows, tokens)

    @torch.no_grad()
    def read(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> Reads:
        """What `probe` asks of logits [U, V] (floating point; not modified).

        index: int64 [P], the row of logits of every entry. position: [P], where its token was fed: the token drawn
        comes one later, which keys the draw. Raises ValueError for logits of another shape.
        """
        if logits.ndim != 2 or logits.shape[1] != self._vocab_size:
            raise ValueError(f"logits must be of shape [rows, {self._vocab_size}], not {list(logits.shape)}")
        reads, emptied = self._readers[probe.kind](logits, probe, index, position)
        if reads.bad.any():
            reads.why = {i: self._why(int(probe.slot[i])) for i in emptied.cpu().nonzero()[:, 0].tolist()}
        return reads

    def end_step(self) -> None:
        """All probes of the step are read."""
        self._seen = None
        self.processors.end_step()

    def _why(self, slot: int) -> str:
        """What left nothing of a row of good logits."""
        failure = self.processors.failure(int(self._state.fields["processors"][slot]))
        if failure is not None:
            return f"a logits processor failed: {failure}"
        return "its bans, logit_bias, penalties or logits processors left no token to draw"

    def _sample(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> tuple[Reads, Tensor]:
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
        self.last[self._tensor(probe.slot)] = token
        self._remember(logits, probe.slot, position, shaped, scales)
        ranks = np.where(ranked, rank.cpu().numpy(), 0).astype(np.int32)
        reads = Reads(bad=bad.cpu().numpy(), token=token.int().cpu().numpy(), logp=logp.cpu().numpy(), rank=ranks)
        return reads, emptied

    def _top(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> tuple[Reads, Tensor]:
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
        reads = Reads(
            bad=bad.cpu().numpy(),
            top_id=padded(ids, probe.n, -1).int().cpu().numpy(),
            top_logp=padded(logp, probe.n, -torch.inf).cpu().numpy(),
        )
        if probe.processed:
            reads.top_p = padded(chance, probe.n, 0.0).cpu().numpy()
        if ranked.any():
            reads.top_rank = np.where(ranked[:, None], padded(rank, probe.n, 0).int().cpu().numpy(), 0).astype(np.int32)
        return reads, emptied

    def _target(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> tuple[Reads, Tensor]:
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
        reads = Reads(
            bad=bad.cpu().numpy(),
            logp=logp[:, 0].cpu().numpy(),
            rank=rank.int().cpu().numpy(),
            top_id=padded(ids[:, 1:], probe.n, -1).int().cpu().numpy(),
            top_logp=padded(logp[:, 1:], probe.n, -torch.inf).cpu().numpy(),
        )
        return reads, emptied

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
        entry = np.full(len(self.last), -1, np.int32)
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

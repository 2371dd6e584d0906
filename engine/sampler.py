"""Reads logits: draws tokens and looks up the most probable ones, for the probes of a plan.

Log-probs are the model's own (before bans, bias, penalties and temperature) unless a spec asks for the processed
distribution. Entries are worked on in slices that fit the cache; nothing that is read depends on how they are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.distribution import Distribution, Scale
from pagefork.kernels.filters import GREEDY
from pagefork.kernels.philox import uniform
from pagefork.kernels.sample import choose
from pagefork.kernels.scratch import Scratch, chunks, widened
from pagefork.kernels.top_logprobs import best_ids, padded, token_rank
from pagefork.scheduler.plan import Bools, Forks, Ints, Kind, Opens, Probe, Reads, Rows, Spec

from .custom_logits import LogitsProcessors
from .slot_state import SlotState


class _Part(NamedTuple):
    """Some entries of a probe: a slice that fits the cache."""

    fields: NDArray[Any]  # the parameters of their slots [p]
    logits: Tensor  # as the model gave them, fp32 [p, W]
    adjusted: Tensor  # after bans, bias and penalties; `logits` itself where none applies


class _Seen(NamedTuple):
    """What SAMPLE found out about the rows of this step, so that TOPN of the same rows needs no search of its own."""

    logits: Tensor
    entry: Ints  # [max_slots], index of a slot's entry below, -1 for none
    position: NDArray[Any]  # [P]
    model: Scale
    processed: Scale


class Sampler:
    """The state by slot that reading logits needs, and the read-outs."""

    def __init__(self, max_slots: int, vocab_size: int, max_len: int, device: torch.device) -> None:
        self.last = torch.zeros(max_slots, dtype=torch.int64, device=device)  # the token drawn last; 0 after a bad row
        self.processors = LogitsProcessors(vocab_size)
        self._state = SlotState(max_slots, vocab_size, max_len, device, self.processors)
        self._vocab_size, self._device = vocab_size, device
        self._scratch = Scratch()
        self._seen: _Seen | None = None
        # Reads, and which entries are bad though the model's logits are good.
        self._readers: dict[Kind, Callable[[Tensor, Probe, Tensor, NDArray[Any]], tuple[Reads, Tensor]]] = {
            Kind.SAMPLE: self._sample,
            Kind.TOPN: self._top,
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
        comes one later, which keys the draw. Raises ValueError for a probe that can't be read.
        """
        if probe.kind not in self._readers:
            raise ValueError(f"no read-out for {probe.kind.name}; there are {', '.join(kind.name for kind in self._readers)}")
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
        fields = self._state.fields[probe.slot]
        greedy, ranked = fields["temperature"] < GREEDY, fields["rank"]
        shaped = ~greedy | fields["processed"]  # rows whose processed distribution matters
        keys = map(self._tensor, (fields["seed"], fields["stream"], position + 1))
        number = torch.empty(len(greedy), device=self._device) if greedy.all() else uniform(*keys)
        found: list[tuple[Tensor, ...]] = []
        scales: list[tuple[Scale, Scale]] = []
        for cut, part in self._parts(logits, probe.slot, index, position):
            model, dist = self._distributions(part, shaped[cut])
            token = choose(dist, self._tensor(greedy[cut]), number[cut])
            processed = dist.scale() if shaped[cut].any() else model
            bad = model.bad | dist.bad
            token.masked_fill_(bad, 0)
            logp = self._log_probs(part, model, processed, token[:, None])[:, 0].masked_fill_(bad, 0.0)
            rank = self._ranks(part, token) if ranked[cut].any() else torch.zeros_like(token)
            found.append((token, logp, rank, bad, bad & ~model.bad))
            scales.append((model, processed))
        token, logp, rank, bad, emptied = map(torch.cat, zip(*found, strict=True))
        self.last[self._tensor(probe.slot)] = token
        if shaped.any():
            self._remember(logits, probe.slot, position, shaped, scales)
        ranks = np.where(ranked, rank.cpu().numpy(), 0).astype(np.int32)
        reads = Reads(bad=bad.cpu().numpy(), token=token.int().cpu().numpy(), logp=logp.cpu().numpy(), rank=ranks)
        return reads, emptied

    def _top(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> tuple[Reads, Tensor]:
        known = self._recall(logits, probe.slot, position)
        n = min(probe.n, self._vocab_size)
        found: list[tuple[Tensor, ...]] = []
        for cut, part in self._parts(logits, probe.slot, index, position):
            if known is None:
                model, dist = self._distributions(part, np.ones(len(part.fields), np.bool_))
                processed = dist.scale()
            else:
                model, processed = (scale.pick(cut) for scale in known)
            ids = best_ids(self._ordered(part, processed), n)
            chance = processed.log_probs(part.adjusted.gather(-1, ids)).exp_()
            found.append((ids, self._log_probs(part, model, processed, ids), chance, model.bad, processed.bad))
        ids, logp, chance, broken, bad = map(torch.cat, zip(*found, strict=True))
        reads = Reads(
            bad=(broken | bad).cpu().numpy(),
            top_id=padded(ids, probe.n, -1).int().cpu().numpy(),
            top_logp=padded(logp, probe.n, -torch.inf).cpu().numpy(),
            top_p=padded(chance, probe.n, 0.0).cpu().numpy(),
        )
        return reads, bad & ~broken

    def _target(self, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> tuple[Reads, Tensor]:
        """Log-prob and rank of given tokens, and the most probable ones at their places."""
        assert probe.target is not None
        target, wanted = self._tensor(probe.target).long(), self._state.fields["processed"][probe.slot]
        n = min(probe.n, self._vocab_size)
        found: list[tuple[Tensor, ...]] = []
        for cut, part in self._parts(logits, probe.slot, index, position, wanted):
            model, dist = self._distributions(part, wanted[cut])
            processed = dist.scale() if wanted[cut].any() else model
            bad = torch.where(self._tensor(wanted[cut]), processed.bad, model.bad)
            ids = torch.cat((target[cut, None], best_ids(self._ordered(part, processed), n)), -1)
            logp = self._log_probs(part, model, processed, ids)
            found.append((bad, bad & ~model.bad, self._ranks(part, target[cut]), ids, logp))
        bad, emptied, rank, ids, logp = map(torch.cat, zip(*found, strict=True))
        reads = Reads(
            bad=bad.cpu().numpy(),
            logp=logp[:, 0].cpu().numpy(),
            rank=rank.int().cpu().numpy(),
            top_id=padded(ids[:, 1:], probe.n, -1).int().cpu().numpy(),
            top_logp=padded(logp[:, 1:], probe.n, -torch.inf).cpu().numpy(),
        )
        return reads, emptied

    def _parts(
        self, logits: Tensor, slot: Ints, index: Tensor, position: NDArray[Any], adjusting: Bools | None = None
    ) -> Iterator[tuple[slice, _Part]]:
        """One part at a time: the next one overwrites the memory of the last. Only rows marked `adjusting` need `adjusted`."""
        for cut in chunks(len(slot), self._vocab_size, self._device):
            model = widened(self._rows(logits, index[cut]), self._scratch)
            adjusted = model
            if adjusting is None or adjusting[cut].any():
                adjusted = self._state.adjust(model, slot[cut], position[cut], self._scratch)
            yield cut, _Part(self._state.fields[slot[cut]], model, adjusted)

    def _rows(self, logits: Tensor, index: Tensor) -> Tensor:
        if len(index) and index.device.type == "cpu":
            first, last = int(index[0]), int(index[-1])
            if last - first + 1 == len(index) and torch.equal(index, torch.arange(first, last + 1)):
                return logits[first : last + 1]
        out = self._scratch.take("gathered", (len(index), logits.shape[1]), logits.dtype, logits.device)
        return torch.index_select(logits, 0, index, out=out)

    def _distributions(self, part: _Part, shaped: Bools) -> tuple[Scale, Distribution]:
        """The model's distribution; the processed one where `shaped`, elsewhere only its best token means anything."""
        model = Distribution(part.logits, None, self._scratch)
        scale = model.scale()
        fields = part.fields
        heat = np.where(shaped & (fields["temperature"] >= GREEDY), fields["temperature"], np.float32(1))
        plain = bool((heat == 1).all())
        same = plain and part.adjusted is part.logits
        dist = model if same else Distribution(part.adjusted, None if plain else self._tensor(heat), self._scratch)
        if shaped.any():
            limits = (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
            dist.restrict(*(self._tensor(np.where(shaped, fields[name], off)) for name, off in limits))
        return scale, dist

    def _log_probs(self, part: _Part, model: Scale, processed: Scale, ids: Tensor) -> Tensor:
        """Log-probs fp32 [p, n] of ids [p, n], of the distribution that each row reports."""
        own = model.log_probs(part.logits.gather(-1, ids))
        if not part.fields["processed"].any():
            return own
        wanted = self._tensor(part.fields["processed"])[:, None]
        return torch.where(wanted, processed.log_probs(part.adjusted.gather(-1, ids)), own)

    def _ranks(self, part: _Part, token: Tensor) -> Tensor:
        own = token_rank(part.logits, token, self._scratch)
        if part.adjusted is part.logits or not part.fields["processed"].any():
            return own
        return torch.where(self._tensor(part.fields["processed"]), token_rank(part.adjusted, token, self._scratch), own)

    def _ordered(self, part: _Part, processed: Scale) -> Tensor:
        """Values fp32 [p, W] that order the tokens by the log-probs that each row reports."""
        if not part.fields["processed"].any():
            return part.logits
        kept = part.adjusted.masked_fill(part.adjusted < processed.floor[:, None], -torch.inf)
        return torch.where(self._tensor(part.fields["processed"])[:, None], kept, part.logits)

    def _remember(
        self, logits: Tensor, slot: Ints, position: NDArray[Any], shaped: Bools, scales: list[tuple[Scale, Scale]]
    ) -> None:
        entry = np.full(len(self.last), -1, np.int32)
        entry[slot[shaped]] = shaped.nonzero()[0]
        model, processed = (Scale(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*scales, strict=True))
        self._seen = _Seen(logits, entry, position, model, processed)

    def _recall(self, logits: Tensor, slot: Ints, position: NDArray[Any]) -> tuple[Scale, Scale] | None:
        """The scales of these entries, if SAMPLE of this step found them all."""
        if self._seen is None or self._seen.logits is not logits:
            return None
        entry = self._seen.entry[slot]
        if (entry < 0).any() or (self._seen.position[entry] != position).any():
            return None
        return self._seen.model.pick(self._tensor(entry)), self._seen.processed.pick(self._tensor(entry))

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, non_blocking=True)

"""The read-outs of a probe by the fused kernels: one pass over the logits, then only what its records point at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.best_tokens import MAX_BEST, best_tokens
from pagefork.kernels.draw import Draws, draw
from pagefork.kernels.entries import Entry
from pagefork.kernels.filters import GREEDY
from pagefork.kernels.scales import model_scale, own_scale
from pagefork.kernels.token_rank import token_ranks, token_values
from pagefork.kernels.top_logprobs import padded
from pagefork.kernels.upload import upload, upload_index
from pagefork.scheduler.plan import Bools, Ints, Kind, Probe

from .fused_draw import DrawEntries, Drawn
from .fused_merge import merge_columns
from .fused_pass import Passes, Read
from .pending import Columns
from .probe_entries import any_limits, flagged, probe_records
from .slot_state import SlotState


class _Seen(NamedTuple):
    """What SAMPLE found out about the rows of this step, so that TOPN of the same rows needs no pass of its own."""

    entry: Ints  # [max_slots], index of a slot's entry, -1 for none
    position: NDArray[Any]  # [P]
    shaped: Bools  # [P], where `processed` means anything
    read: Read


class FusedReads:
    """Reads logits of any number of entries at once, on devices where the kernels run."""

    def __init__(self, state: SlotState, vocab_size: int, device: torch.device) -> None:
        self._state, self._vocab_size, self._device = state, vocab_size, device
        self._passes = Passes(state, device)
        self._seen: _Seen | None = None
        self._readers: dict[Kind, Callable[[Tensor, Probe, NDArray[Any], NDArray[Any]], Columns]] = {
            Kind.SAMPLE: self._sample,
            Kind.TOPN: self._top,
            Kind.MERGE: self._merge,
            Kind.TARGET: self._target,
        }

    def takes(self, probe: Probe) -> bool:
        """Whether there are kernels for all that `probe` asks."""
        fields, slot = self._state.fields, probe.slot
        best = min(probe.n, self._vocab_size) <= MAX_BEST or probe.kind is Kind.MERGE
        inside_prompts = probe.kind is Kind.TARGET and (fields["processed"][slot] & fields["history"][slot]).any()
        return bool(best and not inside_prompts and not fields["processors"][slot].any())

    def read(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        """As in Sampler.read."""
        return self._readers[probe.kind](logits, probe, row, position)

    def forget(self) -> None:
        """What was found of the logits so far is not that of the logits to come."""
        self._seen = None
        self._passes.forget()

    def draw_entries(self, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> DrawEntries | None:
        """As in Sampler.draw_entries."""
        if not self.takes(probe):
            return None
        records = self._draw_records(probe, row, position)
        return None if flagged(records, Entry.ADJUSTED).any() else DrawEntries(records, probe.slot)

    def read_drawn(self, probe: Probe, position: NDArray[Any], drawn: Drawn) -> Columns:
        """As `read` of a SAMPLE whose `draw_entries` were drawn for."""
        given, draws = drawn
        return self._drawn(probe, position, Read(given, np.zeros(len(probe.slot), np.bool_), draws.model, draws.processed), draws)

    def _sample(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        records = self._draw_records(probe, row, position)
        given = self._passes.over(logits, probe, records)
        draws = draw(*given, filtered=any_limits(records))
        read = Read(given, flagged(records, Entry.ADJUSTED), draws.model, draws.processed)
        return self._drawn(probe, position, read, draws)

    def _draw_records(self, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> NDArray[Any]:
        shaped = self._shaped(probe)
        return self._records(probe, row, position, shaped, np.ones_like(shaped))

    def _shaped(self, probe: Probe) -> Bools:
        """Entries [P] of a SAMPLE whose processed distribution matters."""
        fields, slot = self._state.fields, probe.slot
        shaped: Bools = (fields["temperature"][slot] >= GREEDY) | fields["processed"][slot]
        return shaped

    def _drawn(self, probe: Probe, position: NDArray[Any], read: Read, draws: Draws) -> Columns:
        """The columns of a SAMPLE; its entries are the first of `draws`."""
        count = len(probe.slot)
        entry = np.full(len(self._state.fields), -1, np.int32)
        entry[probe.slot] = np.arange(count)
        self._seen = _Seen(entry, position, self._shaped(probe), read)
        token, bad = draws.token[:count], draws.bad[:count]
        rank = None
        if self._state.fields["rank"][probe.slot].any():
            rank = self._ranks(probe, read.pick(np.arange(count)), token[:, None])
        return {
            "bad": bad,
            "token": token.int(),
            "logp": draws.logprob[:count],
            "rank": torch.zeros_like(token, dtype=torch.int32) if rank is None else rank[:, 0],
            "emptied": bad & ~draws.model.bad[:count],
        }

    def _top(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        """The most probable tokens by the log-probs that are reported, or by the processed probability."""
        n, reports = min(probe.n, self._vocab_size), self._state.fields["processed"][probe.slot]
        shaped = reports | probe.processed
        read = self._distributions(logits, probe, row, position, shaped)
        if not probe.processed:
            bad = self._bad(read, shaped)
            ids, logp = self._best(read, shaped, n)
            columns = {"bad": bad | read.model.bad, "emptied": bad & ~read.model.bad}
        else:
            columns, ids, logp = self._likely(probe, read, n, reports)
        columns["top_id"] = padded(ids, probe.n, -1).int()
        columns["top_logp"] = padded(logp, probe.n, -torch.inf)
        return columns

    def _likely(self, probe: Probe, read: Read, n: int, reports: Bools) -> tuple[Columns, Tensor, Tensor]:
        """By the processed probability: columns of their own, ids [P, n] and log-probs [P, n]."""
        model, processed = read.model, read.processed
        every = upload(np.ones_like(reports), self._device)
        ids, values = best_tokens(*read.given, n, processed.floor, every)
        own = processed.log_probs(values)
        chance = own.exp().masked_fill_(ids < 0, 0.0)
        logp = own
        if not reports.all():
            raw = model.log_probs(token_values(read.given.logits, read.given.entries, None, ids))
            logp = torch.where(upload(reports, self._device)[:, None], own, raw)
        bad = processed.bad & (chance[:, 0] != 0)  # that nothing is left is an answer: no token has a chance
        hopeless = chance == 0
        columns = {
            "bad": bad | model.bad,
            "emptied": bad & ~model.bad,
            "top_p": padded(chance, probe.n, 0.0),
        }
        rank = self._ranks(probe, read, ids)
        if rank is not None:
            columns["top_rank"] = padded(rank.masked_fill_(hopeless, 0), probe.n, 0)
        return columns, ids.masked_fill_(hopeless, -1), logp.masked_fill(hopeless, -torch.inf)

    def _target(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        """Log-prob and rank of given tokens, and the most probable ones at their places."""
        assert probe.target is not None
        n, reports = min(probe.n, self._vocab_size), self._state.fields["processed"][probe.slot]
        read = self._distributions(logits, probe, row, position, reports)
        target = upload_index(probe.target[:, None], self._device)
        bad = self._bad(read, reports)
        adjusted = self._passes.mask(reports & read.adjusted)
        values = token_values(logits, read.given.entries, read.given.table, target, adjusted)
        ids, logp = self._best(read, reports, n)
        return {
            "bad": bad,
            "logp": self._log_probs(read, reports, values)[:, 0],
            "rank": token_ranks(*read.given, target, adjusted)[:, 0].int(),
            "top_id": padded(ids, probe.n, -1).int(),
            "top_logp": padded(logp, probe.n, -torch.inf),
            "emptied": bad & ~read.model.bad,
        }

    def _merge(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        nothing = np.zeros(len(probe.slot), np.bool_)
        records = self._records(probe, row, position, nothing, ~nothing)
        if probe.processed:
            given = self._passes.over(logits, probe, records)
            return merge_columns(self._passes, given, model_scale(given.stats), probe)
        return merge_columns(self._passes, *self._passes.for_log_probs(logits, probe, records), probe)

    def _records(self, probe: Probe, row: NDArray[Any], position: NDArray[Any], shaped: Bools, adjusting: Bools) -> NDArray[Any]:
        return probe_records(self._state, self._vocab_size, probe.slot, row, position, shaped, adjusting)

    def _distributions(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any], shaped: Bools) -> Read:
        """Of the model, and processed where `shaped`."""
        known = self._recall(logits, probe.slot, position, shaped)
        if known is not None:
            return known
        records = self._records(probe, row, position, shaped, shaped)
        records["flags"] &= ~int(Entry.GREEDY)  # the limits of an entry that draws nothing matter nevertheless
        given, adjusted = self._passes.over(logits, probe, records), flagged(records, Entry.ADJUSTED)
        if any_limits(records):
            drawn = draw(*given, filtered=True)
            return Read(given, adjusted, drawn.model, drawn.processed)
        model = model_scale(given.stats)
        return Read(given, adjusted, model, own_scale(given.stats, given.entries) if len(given.stats.top) > 1 else model)

    def _recall(self, logits: Tensor, slot: Ints, position: NDArray[Any], shaped: Bools) -> Read | None:
        """What SAMPLE of this step found of these entries, if it read them all, and processed where `shaped`."""
        if self._seen is None or self._seen.read.given.logits is not logits:
            return None
        entry, read = self._seen.entry[slot], self._seen.read
        missing = (entry < 0) | (self._seen.position[entry] != position) | (shaped & ~self._seen.shaped[entry])
        if missing.any():
            return None
        return read.pick(entry)

    def _best(self, read: Read, own: Bools, n: int) -> tuple[Tensor, Tensor]:
        """The n best tokens and their log-probs, [P, n], processed ones where `own`; what has no chance comes by id."""
        if n == 0:
            empty = read.model.top.new_empty(len(own), 0)
            return empty.long(), empty
        if not own.any():
            ids, values = best_tokens(*read.given, n, impossible=True)
            return ids, read.model.log_probs(values)
        ids, values = best_tokens(*read.given, n, read.processed.floor, self._passes.mask(own))
        return _completed(ids), self._log_probs(read, own, values)

    def _log_probs(self, read: Read, own: Bools, values: Tensor) -> Tensor:
        """Of values [P, n], of the processed distribution where `own`."""
        found = read.model.log_probs(values)
        mask = self._passes.mask(own)
        return found if mask is None else torch.where(mask[:, None], read.processed.log_probs(values), found)

    def _bad(self, read: Read, own: Bools) -> Tensor:
        mask = self._passes.mask(own)
        return read.model.bad if mask is None else torch.where(mask, read.processed.bad, read.model.bad)

    def _ranks(self, probe: Probe, read: Read, ids: Tensor) -> Tensor | None:
        """Ranks of ids [P, n], int32, in the order that each entry reports; 0 where its spec did not ask, None if none did."""
        fields = self._state.fields[probe.slot]
        wanted = self._passes.mask(fields["rank"])
        if wanted is None:
            return None
        found = token_ranks(*read.given, ids, self._passes.mask(fields["processed"] & read.adjusted))
        return found.masked_fill_(~wanted[:, None], 0).int()


def _completed(ids: Tensor) -> Tensor:
    """ids int64 [P, n] in which -1, at the end of each row, gives way to the lowest ids that the row has not."""
    n = ids.shape[1]
    lowest = torch.arange(n, device=ids.device)
    taken = (ids[:, :, None] == lowest).any(1)
    free = taken.long().argsort(dim=-1, stable=True)  # those not taken come first
    place = (lowest - (ids >= 0).sum(-1, keepdim=True)).clamp(min=0)
    return torch.where(ids < 0, free.gather(-1, place), ids)

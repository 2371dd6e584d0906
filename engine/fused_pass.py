"""The one pass over the logits of a probe, from which all fused read-outs start.

Nothing here waits for the device, so that a step's kernels are launched without a pause.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.adjusted_stats import adjust_stats
from pagefork.kernels.distribution import Scale
from pagefork.kernels.entries import Entry
from pagefork.kernels.group_stats import GroupStats, group_stats
from pagefork.kernels.scales import model_scale
from pagefork.kernels.token_table import TokenTable
from pagefork.kernels.upload import upload, upload_index
from pagefork.scheduler.plan import Bools, Ints, Probe

from .probe_entries import flagged, words
from .slot_state import SlotState


class Given(NamedTuple):
    """What kernels are given of a probe."""

    logits: Tensor  # [U, V]
    entries: Tensor  # int32 [P, WORDS]
    stats: GroupStats
    table: TokenTable | None  # where any entry is ADJUSTED


class Read(NamedTuple):
    """A probe whose distributions are known."""

    given: Given  # of the P entries, and perhaps padding behind them
    adjusted: Bools  # [P]
    model: Scale
    processed: Scale  # means nothing where processing does not matter to the entry

    def pick(self, entry: NDArray[Any]) -> Read:
        """Of some entries, no padding among them."""
        logits, entries, stats, table = self.given
        if len(entry) == len(entries) and (entry == np.arange(len(entry))).all():
            return self
        at = upload_index(entry, logits.device)
        given = Given(logits, entries[at], GroupStats(stats.top[:, at], stats.mass[:, at]), table)
        return Read(given, self.adjusted[entry], self.model.pick(at), self.processed.pick(at))


class Passes:
    """Makes records of groups, those of bans, bias and penalties included."""

    def __init__(self, state: SlotState, device: torch.device) -> None:
        assert state.marks is not None
        self.state, self.device = state, device
        self._marks = state.marks
        self._banned = np.zeros(len(state.fields), np.bool_)  # slots whose bans of this step are in the table

    def forget(self) -> None:
        """Another step begins."""
        self._banned[:] = False

    def over(self, logits: Tensor, probe: Probe, records: NDArray[Any]) -> Given:
        """records: ENTRY [P]."""
        given = self._over(logits, records)
        return self._adjusted(given, probe, records, None)

    def for_log_probs(self, logits: Tensor, probe: Probe, records: NDArray[Any]) -> tuple[Given, Scale]:
        """Where bans, bias and penalties apply to the model's log-probs; with the scale of these."""
        given = self._over(logits, records)
        model = model_scale(given.stats)
        return self._adjusted(given, probe, records, model), model

    def mask(self, entries: Bools) -> Tensor | None:
        """bool [P] on the device; None where it would mark nothing."""
        return upload(entries, self.device) if entries.any() else None

    def _over(self, logits: Tensor, records: NDArray[Any]) -> Given:
        entries = upload(words(records), self.device)
        return Given(logits, entries, group_stats(logits, entries, bool(flagged(records, Entry.OWN).any())), None)

    def _adjusted(self, given: Given, probe: Probe, records: NDArray[Any], log_probs: Scale | None) -> Given:
        adjusted = flagged(records, Entry.ADJUSTED)
        if not adjusted.any():
            return given
        slot = probe.slot[adjusted]
        table = self._table(slot, records["position"][adjusted] - 1)
        adjust_stats(given.stats, given.logits, given.entries, table, most=self._marks.most(slot), log_probs=log_probs)
        return given._replace(table=table)

    def _table(self, slot: Ints, position: NDArray[Any]) -> TokenTable:
        """The token table, with all that slots ban after `position`."""
        fresh = ~self._banned[slot]
        if fresh.any():
            new, at = np.unique(slot[fresh], return_index=True)
            self.state.ban_step(new, position[fresh][at])
            self._banned[new] = True
        assert self._marks.table is not None
        return self._marks.table

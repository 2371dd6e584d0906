"""The draws of a step by the fused kernels, as a graph can hold them: entries come in one array, and nothing is adjusted."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.draw import Draws, draw
from pagefork.kernels.entries import WORDS
from pagefork.kernels.group_stats import group_stats
from pagefork.scheduler.plan import Ints

from .fused_pass import Given
from .probe_entries import any_limits, neutral_records, words


class DrawEntries(NamedTuple):
    """The entries of a SAMPLE of which none is ADJUSTED."""

    records: NDArray[Any]  # ENTRY [P]
    slot: Ints  # [P], whose last token is drawn

    @property
    def filtered(self) -> bool:
        """Whether any entry has limits."""
        return any_limits(self.records)

    def arrays(self, size: int, nobody: int) -> dict[str, Ints]:
        """Padded to `size` entries, which draw for slot `nobody`: `entries` [size, WORDS] and `entry_slots` [size]."""
        count = len(self.records)
        entries, slots = np.empty((size, WORDS), np.int32), np.full(size, nobody, np.int32)
        entries[:count], entries[count:], slots[:count] = words(self.records), words(neutral_records(1)), self.slot
        return {"entries": entries, "entry_slots": slots}


class Drawn(NamedTuple):
    """What was drawn for the first P of N entries; the others are padding."""

    given: Given
    draws: Draws


def draw_entries(logits: Tensor, entries: Tensor, slots: Tensor, last: Tensor, filtered: bool) -> Drawn:
    """Draws for int32 entries [N, WORDS], and notes the tokens as the last ones of slots [N] in int64 [slots]."""
    stats = group_stats(logits, entries, own=True)
    draws = draw(logits, entries, stats, None, filtered=filtered)
    last.index_copy_(0, slots.long(), draws.token)
    return Drawn(Given(logits, entries, stats, None), draws)

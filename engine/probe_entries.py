"""The records that tell kernels of the entries of a probe, from what is known of their slots."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagefork.kernels.entries import ENTRY, WORDS, Entry
from pagefork.kernels.filters import GREEDY
from pagefork.scheduler.plan import Bools, Ints

from .slot_state import SlotState

_PENALTIES = (("repetition", "repetition_penalty"), ("frequency", "frequency_penalty"), ("presence", "presence_penalty"))


def probe_records(
    state: SlotState, vocab_size: int, slot: Ints, row: NDArray[Any], position: NDArray[Any], shaped: Bools, adjusting: Bools
) -> NDArray[Any]:
    """ENTRY [P] of slots that are read at rows of the logits, their tokens fed at `position`.

    shaped: entries whose processed distribution matters; temperature and limits of the others are off. adjusting: entries
    whose bans, bias and penalties matter.
    """
    assert state.marks is not None
    fields, table_row = state.fields.take(slot), state.marks.row[slot]
    adjusted = adjusting & state.adjusted(slot, position) & (table_row >= 0)
    greedy = fields["temperature"] < GREEDY
    records = np.zeros(len(slot), ENTRY)
    records["row"], records["slot"], records["position"] = row, table_row, position + 1
    heat = records["temperature"] = np.where(shaped & ~greedy, fields["temperature"], np.float32(1))
    limited = shaped & (fields["top_k"] > 0) & (fields["top_k"] < vocab_size)
    records["top_k"] = np.where(limited, fields["top_k"], 0)
    records["top_p"] = np.where(shaped, fields["top_p"], 1.0)
    with np.errstate(divide="ignore"):
        records["min_p_depth"] = heat.astype(np.float64) * np.log(np.where(shaped, fields["min_p"], 0.0))
    for name, source in _PENALTIES:
        records[name] = fields[source]
    records["seed"], records["stream"] = fields["seed"], fields["stream"]
    flags = [(Entry.GREEDY, greedy), (Entry.PROCESSED, fields["processed"]), (Entry.OWN, adjusted | (heat != 1))]
    if adjusted.any():
        penalised = (fields["repetition_penalty"] != 1) | (fields["frequency_penalty"] != 0) | (fields["presence_penalty"] != 0)
        flags += [
            (Entry.ADJUSTED, adjusted),
            (Entry.ONLY, adjusted & state.restricted(slot)),
            (Entry.NO_END, adjusted & state.ends_banned(slot, position)),
            (Entry.COUNTED, adjusted & penalised),
        ]
    records["flags"] = sum(holds * np.int32(flag) for flag, holds in flags)
    return records


def neutral_records(count: int) -> NDArray[Any]:
    """ENTRY [count] of padding: they take the best token of row 0."""
    records = np.zeros(count, ENTRY)
    records["flags"], records["temperature"], records["top_p"], records["min_p_depth"] = int(Entry.GREEDY), 1, 1, -np.inf
    return records


def words(records: NDArray[Any]) -> NDArray[np.int32]:
    """int32 [P, WORDS], as kernels take records."""
    return records.view(np.int32).reshape(len(records), WORDS)


def flagged(records: NDArray[Any], flag: Entry) -> Bools:
    """Entries [P] that have a flag."""
    found: Bools = (records["flags"] & int(flag)) != 0
    return found


def any_limits(records: NDArray[Any]) -> bool:
    """Whether top-k, top-p or min-p is on anywhere."""
    return bool(((records["top_k"] > 0) | (records["top_p"] < 1) | (records["min_p_depth"] > -np.inf)).any())

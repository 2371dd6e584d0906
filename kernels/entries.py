"""What kernels are told of every entry of a read-out: one record of 32-bit words, so that a step uploads one array.

An entry is one place at which logits are read for one sequence. Several entries may name one row of the logits.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Any

import numpy as np
from torch import Tensor

from ._triton import constant, jit, tl


class Entry(IntFlag):
    """What holds for an entry."""

    GREEDY = 1  # the most probable token is taken
    PROCESSED = 2  # log-probs are reported of the processed distribution
    OWN = 4  # its distribution is not the softmax of its row: statistics of its own are kept
    ADJUSTED = 8  # tokens of its slot's table have other values than the model's
    ONLY = 16  # tokens that are not marked as allowed in the table are banned
    NO_END = 32  # end tokens are banned for now
    COUNTED = 64  # penalties apply


ENTRY = np.dtype(
    [
        ("row", np.int32),  # of the logits
        ("flags", np.int32),
        ("temperature", np.float32),  # > 0; 1 where greedy
        ("top_k", np.int32),  # 0: off
        ("top_p", np.float64),  # 1: off
        ("min_p_depth", np.float64),  # temperature * log(min_p); -inf: off
        ("seed", np.int64),
        ("stream", np.int64),
        ("position", np.int32),  # that the token which is drawn will have
        ("slot", np.int32),  # row of the token table
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("unused", np.float32),
    ]
)
WORDS = ENTRY.itemsize // 4


def _word(name: str) -> Any:
    assert ENTRY.fields is not None
    return constant(ENTRY.fields[name][1] // 4)


# Offsets of the fields, in words, as kernels use them.
ENTRY_WORDS = constant(WORDS)
ROW, FLAGS, TEMPERATURE, TOP_K = _word("row"), _word("flags"), _word("temperature"), _word("top_k")
TOP_P, MIN_P_DEPTH, SEED, STREAM = _word("top_p"), _word("min_p_depth"), _word("seed"), _word("stream")
POSITION, SLOT = _word("position"), _word("slot")
REPETITION, FREQUENCY, PRESENCE = _word("repetition"), _word("frequency"), _word("presence")
GREEDY, PROCESSED, OWN, ADJUSTED = (constant(int(flag)) for flag in (Entry.GREEDY, Entry.PROCESSED, Entry.OWN, Entry.ADJUSTED))
ONLY, NO_END, COUNTED = (constant(int(flag)) for flag in (Entry.ONLY, Entry.NO_END, Entry.COUNTED))


@jit
def entry_int(entry: tl.tensor, word: tl.constexpr) -> tl.tensor:
    """An int32 field. entry: pointer to the entry's first word."""
    return tl.load(entry + word)


@jit
def entry_float(entry: tl.tensor, word: tl.constexpr) -> tl.tensor:
    """A float32 field."""
    return tl.load(entry + word).to(tl.float32, bitcast=True)


@jit
def entry_long(entry: tl.tensor, word: tl.constexpr) -> tl.tensor:
    """An int64 field."""
    low = tl.load(entry + word).to(tl.int64) & 0xFFFFFFFF
    return (tl.load(entry + word + 1).to(tl.int64) << 32) | low


@jit
def entry_double(entry: tl.tensor, word: tl.constexpr) -> tl.tensor:
    """A float64 field."""
    return entry_long(entry, word).to(tl.float64, bitcast=True)


def check_entries(entries: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless `entries` is int32 [P, WORDS] on the device of `logits`. Their content is the caller's word."""
    if entries.ndim != 2 or entries.shape[1] != WORDS or str(entries.dtype) != "torch.int32" or not entries.is_contiguous():
        raise ValueError(f"entries must be contiguous int32 [P, {WORDS}], not {entries.dtype} {list(entries.shape)}")
    if entries.device != logits.device:
        raise ValueError(f"entries on {entries.device} do not go with logits on {logits.device}")

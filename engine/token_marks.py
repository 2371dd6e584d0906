"""Which tokens of a slot have logits of their own: the token table of the fused kernels, and what the host knows of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels._triton import power_of_two
from pagefork.kernels.history_bans import ban_repeats, ban_word_ends
from pagefork.kernels.token_cells import State
from pagefork.kernels.token_table import LEAST_CELLS, TokenTable, clear, fork, grown, mark, new_table
from pagefork.kernels.upload import upload, upload_index
from pagefork.scheduler.plan import Bools, Forks, Ints, Opens, Rows, Spec

_FIRST_ROWS, _FIRST_CELLS = 16, 1024
_FIELDS = np.dtype(
    [
        ("row", np.int32),  # of the table, -1: none
        ("prompt_len", np.int32),
        ("counts", np.bool_),  # output tokens are noted as they are fed
        ("prompt", np.bool_),  # and so are those of the prompt
        ("repeats", np.bool_),  # any of its tokens may be banned as the end of an n-gram
        ("known", np.int32),  # tokens that were given so far: those fed again change nothing
        ("cells", np.int32),  # how many cells it has at most
    ]
)


class TokenMarks:
    """The token table, kept as slots open, fork and are fed. Nothing here waits for the device.

    A slot that needs no table has no row in it. `row` [max_slots] says which one a slot has, -1 for none: what the `slot`
    field of an ENTRY takes; an entry is ADJUSTED only if its slot has a row. A slot has one if its spec has penalties,
    n-grams, bad words, allowed ids, biases, or ends that min_tokens bans for a while.

    A step calls `fork`, `open` and `feed`, in this order and with what the plan says, and before logits are read, once
    for all slots that are read and have n-grams or words, `ban_step`. `table` (None until a slot needs it) is
    then what the kernels take; it may be another one in the next step. It says what holds after all tokens that a slot was
    given, so that entries at earlier positions can't be read by it where a spec has penalties.
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self.table: TokenTable | None = None
        self._slots = np.zeros(max_slots, _FIELDS)
        self._slots["row"] = -1
        self._rows = 0  # that were ever given out
        self._free: list[int] = []  # those of them that no slot has
        self._vocab_size, self._device = vocab_size, device

    @property
    def row(self) -> Ints:
        """The row of the table that each slot has, int32 [max_slots]; -1: none."""
        rows: Ints = self._slots["row"]
        return rows

    def most(self, slot: Ints) -> int:
        """How many groups of tokens the table touches in these slots, at most: what `adjust_stats` takes as `most`."""
        return int(self._slots["cells"][slot].max(initial=0))

    def fork(self, forks: Forks) -> None:
        """Slots dst become src; all sources are read before any slot is written."""
        copied = self._slots[forks.src]
        wanted = copied["row"] >= 0
        self._assign(forks.dst, wanted)
        sources, copied["row"] = copied["row"][wanted], self.row[forks.dst]
        self._slots[forks.dst] = copied
        if len(sources):
            fork(self._reserved(), *(upload_index(rows, self._device) for rows in (sources, copied["row"][wanted])))

    def open(self, opens: Opens, specs: list[Spec]) -> None:
        """Slots start afresh, with the tokens that their specs list and the history given. Ids are in the vocabulary."""
        spans = list(zip(opens.spec.tolist(), opens.begin.tolist(), opens.end.tolist(), strict=True))
        starts = {span: _start(specs[span[0]], opens.tokens[span[1] : span[2]]) for span in set(spans)}
        started = [starts[span] for span in spans]
        wanted = np.array([start.slot["row"] >= 0 for start in started], np.bool_)
        self._assign(opens.slot, wanted)
        for slot, start in zip(opens.slot.tolist(), started, strict=True):
            row = self.row[slot]
            self._slots[slot] = start.slot
            self._slots["row"][slot] = row
        rows = self.row[opens.slot]
        if wanted.any():
            clear(self._reserved(), upload_index(rows[wanted], self._device))
        count = [start.marks.shape[1] for start in started]
        if any(count):
            marks = np.concatenate([np.repeat(rows, count)[None], np.concatenate([start.marks for start in started], 1)])
            slot, token, state, bias = upload(marks, self._device)
            mark(self._reserved(), slot, token, state, bias.view(torch.float32))

    def feed(self, rows: Rows, tokens: Tensor) -> None:
        """Notes the tokens fed, int64 [T] on the device."""
        held = self._slots.take(rows.slot)
        follows = held["counts"] | held["repeats"]
        if not follows.any():
            return
        count = np.diff(rows.offset)
        known = np.maximum(held["known"], rows.start + count)
        cells = np.minimum(held["cells"] + np.where(follows, known - np.maximum(held["known"], rows.start), 0), self._vocab_size)
        self._slots["known"][rows.slot], self._slots["cells"][rows.slot] = known, cells
        if not held["counts"].any():
            return
        row = np.repeat(np.arange(len(count)), count)
        position = rows.start[row] + np.arange(len(row)) - rows.offset[row]
        of_prompt = position < held["prompt_len"][row]
        noted = held["counts"][row] & (position >= held["known"][row]) & (held["prompt"][row] | ~of_prompt)
        marks = np.stack((np.where(noted, held["row"][row], -1), np.where(of_prompt, State.PROMPT, 1))).astype(np.int32)
        slot, state = upload(marks, self._device)
        mark(self._reserved(), slot, tokens, state)

    def ban_step(
        self,
        slot: Ints,
        position: NDArray[Any],
        history: Tensor,
        ngram: NDArray[Any],
        words: tuple[NDArray[np.int64], NDArray[Any]],
    ) -> None:
        """Bans what n-grams and words forbid for the draw after `position`, of slots [P], each once.

        position: [P], the last position that counts. history: int32 [max_slots, L] on the device, the tokens of every slot.
        ngram: [P], the n of each, 0 for none. words: as `Ragged.gather` gives them, the index into `slot` and the items
        (token, back) of the words of all slots, see `ban_words`; of one token, they are banned since `open`.
        """
        row, length = self.row[slot], position + 1
        p = np.flatnonzero((ngram > 0) & (ngram <= length))
        if len(p):
            repeats = np.stack((row[p], slot[p], length[p], ngram[p]), 1).astype(np.int32)
            ban_repeats(self._reserved(), history, upload(repeats, self._device), int(length[p].max()))
        index, items = words
        begin = np.flatnonzero(items["back"] == 0)
        count = np.diff(begin, append=len(items))
        begin, count = begin[count > 1], count[count > 1]
        if len(begin):
            p = index[begin]
            table = np.stack((row[p], slot[p], length[p], begin, count), 1).astype(np.int32)
            sent = upload(np.concatenate((table.ravel(), items["token"].astype(np.int32))), self._device)
            ban_word_ends(self._reserved(), history, sent[: table.size].view(table.shape), sent[table.size :])

    def _assign(self, slots: Ints, wanted: Bools) -> None:
        """A row for every slot that wants one; the others give theirs back."""
        row = self.row
        idle = slots[~wanted & (row[slots] >= 0)]
        self._free += row[idle].tolist()
        row[idle] = -1
        for slot in slots[wanted & (row[slots] < 0)].tolist():
            if not self._free:
                self._free.append(self._rows)
                self._rows += 1
            row[slot] = self._free.pop()

    def _reserved(self) -> TokenTable:
        """The table, with all rows that were given out and cells enough for twice what any slot can have."""
        most, enough = self._vocab_size, power_of_two(self._vocab_size, LEAST_CELLS)
        needed = int(self._slots["cells"].max())
        capacity = enough if 2 * needed > most else power_of_two(2 * needed, min(_FIRST_CELLS, enough))
        rows = power_of_two(self._rows, _FIRST_ROWS)
        if self.table is None:
            self.table = new_table(rows, capacity, self._vocab_size, self._device)
        have_rows, have_cells, _ = self.table.cells.shape
        if have_rows < self._rows or have_cells < capacity:
            self.table = grown(self.table, max(rows, have_rows), max(capacity, have_cells))
        return self.table


class _Start(NamedTuple):
    """How a slot begins."""

    slot: Any  # a record of _FIELDS; its row is 0 for any
    marks: NDArray[np.int32]  # [3, N], token, state and bias (the bits of fp32)


def _start(spec: Spec, history: Ints) -> _Start:
    repetition, repeats = spec.repetition_penalty != 1.0, spec.no_repeat_ngram_size > 0
    counts = repetition or spec.frequency_penalty != 0.0 or spec.presence_penalty != 0.0
    prompt, _ = _tally(history[: spec.prompt_len], repetition)
    output, times = _tally(history[spec.prompt_len :], counts)
    parts: list[tuple[Any, Any]] = [
        (spec.end_ids if spec.min_tokens else (), State.END),
        (spec.allowed_ids or (), State.ALLOWED),
        ([word[0] for word in spec.bad_words if len(word) == 1], State.BANNED),
        (prompt, State.PROMPT),
        (output, times),
        ([token for token, _ in spec.logit_bias], 0),
    ]
    marks = np.zeros((3, sum(len(tokens) for tokens, _ in parts)), np.int32)
    begin = 0
    for tokens, state in parts:
        marks[0, begin : begin + len(tokens)], marks[1, begin : begin + len(tokens)] = tokens, state
        begin += len(tokens)
    marks[2, begin - len(spec.logit_bias) :].view(np.float32)[:] = [bias for _, bias in spec.logit_bias]
    later = np.array([word[-1] for word in spec.bad_words], np.int32)
    cells = len(np.unique(np.concatenate((marks[0], later, history if repeats else later))))
    row = 0 if counts or repeats or cells else -1
    return _Start(np.array((row, spec.prompt_len, counts, repetition, repeats, len(history), cells), _FIELDS), marks)


def _tally(tokens: Ints, wanted: bool) -> tuple[Ints, Ints]:
    """The different tokens and how often they occur; none unless `wanted`."""
    token, times = np.unique(tokens if wanted else tokens[:0], return_counts=True)
    return token, times.astype(np.int32)

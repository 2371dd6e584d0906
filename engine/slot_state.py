"""What the sampler knows of every slot: how its logits are processed, and its tokens where they take part.

Host state is a structure of arrays by slot, so that a step gathers the parameters of its rows at once. Only the token
histories live on the device, in one matrix that is allocated when a request first needs it. Penalties and n-grams
are derived from the histories: a fork copies a row of tokens, not counts over the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.bans import allow_tokens, ban_tokens, ban_words
from pagefork.kernels.logit_bias import apply_logit_bias
from pagefork.kernels.ngram import ban_repeated_ngrams
from pagefork.kernels.penalties import apply_penalties
from pagefork.kernels.scratch import Scratch
from pagefork.kernels.upload import upload, upload_index
from pagefork.scheduler.plan import Bools, Forks, Ints, Opens, Rows, Spec

from .custom_logits import LogitsProcessors
from .ragged import Ragged
from .token_marks import TokenMarks

_COPIED = (  # fields of a Spec that are numbers
    ("prompt_len", np.int64),
    ("min_tokens", np.int64),
    ("temperature", np.float32),
    ("top_k", np.int64),
    ("top_p", np.float64),
    ("min_p", np.float64),
    ("repetition_penalty", np.float32),
    ("frequency_penalty", np.float32),
    ("presence_penalty", np.float32),
    ("no_repeat_ngram_size", np.int64),
    ("processed", np.bool_),
    ("rank", np.bool_),
    ("history", np.bool_),
    ("processors", np.int64),
)
_FIELDS = np.dtype([*_COPIED, ("adjusted", np.bool_), ("seed", np.int64), ("stream", np.int64)], align=True)
_BIAS = np.dtype([("token", np.int64), ("bias", np.float32)], align=True)
_WORD = np.dtype([("token", np.int64), ("back", np.int64)])  # see ban_words
_FIRST_COLUMNS = 256


class SlotState:
    """Parameters, sparse lists and token histories by slot."""

    def __init__(
        self,
        max_slots: int,
        vocab_size: int,
        max_len: int,
        device: torch.device,
        processors: LogitsProcessors,
        fused: bool = False,
    ) -> None:
        self.fields = np.zeros(max_slots, _FIELDS)
        self.history: Tensor | None = None  # int32 [max_slots, columns]; what lies past a sequence's end means nothing
        self._end_ids, self._allowed = Ragged(max_slots, np.int64), Ragged(max_slots, np.int64)
        self._bias, self._words = Ragged(max_slots, _BIAS), Ragged(max_slots, _WORD)
        self._lists = self._end_ids, self._allowed, self._bias, self._words
        self._vocab_size, self._max_len, self._device, self._processors = vocab_size, max_len, device, processors
        self.marks = TokenMarks(max_slots, vocab_size, device) if fused else None  # what the fused kernels need besides

    def fork(self, forks: Forks) -> None:
        """dst becomes src but for the stream; all sources are read before any slot is written."""
        src, dst = forks.src, forks.dst
        copied = self.fields[src]
        copied["stream"] = forks.stream
        if self.history is not None and copied["history"].any():
            self.history[self._index(dst)] = self.history[self._index(src)]
        for lists in self._lists:
            lists.copy(src, dst)
        self.fields[dst] = copied
        if self.marks is not None:
            self.marks.fork(forks)

    def open(self, opens: Opens, specs: list[Spec]) -> None:
        """Raises ValueError for a token id outside of the vocabulary."""
        for slot, which, stream in zip(opens.slot.tolist(), opens.spec.tolist(), opens.stream.tolist(), strict=True):
            spec = specs[which]
            numbers = (getattr(spec, name) for name, _ in _COPIED)
            words = [(token, back) for word in spec.bad_words for back, token in enumerate(reversed(word))]
            listed: tuple[NDArray[Any], ...] = (
                np.array(spec.end_ids if spec.min_tokens else (), np.int64),
                np.array(spec.allowed_ids or (), np.int64),
                np.array(list(spec.logit_bias), _BIAS),  # a list of tuples: a tuple would be one record
                np.array(words, _WORD),
            )
            adjusted = spec.history or any(len(items) for items in listed[1:])
            self.fields[slot] = (*numbers, adjusted, np.uint64(spec.seed % 2**64).astype(np.int64), stream)
            for lists, items in zip(self._lists, listed, strict=True):
                self._check(items["token"] if items.dtype.names else items)
                lists.set(slot, items)
        count = np.where(self.fields["history"][opens.slot], opens.end - opens.begin, 0)
        row = np.repeat(np.arange(len(count)), count)
        column = np.arange(len(row)) - (count.cumsum() - count)[row]
        self._write(opens.slot[row], column, self._tensor(opens.tokens[opens.begin[row] + column]))
        if self.marks is not None:
            self.marks.open(opens, specs)

    def feed(self, rows: Rows, tokens: Tensor) -> None:
        """Writes the tokens fed, int64 [T], at their positions, for slots that hold histories."""
        if self.marks is not None:
            self.marks.feed(rows, tokens)
        held = self.fields["history"][rows.slot]
        if not held.any():
            return
        count = np.diff(rows.offset)
        row = np.repeat(np.arange(len(count)), count)
        position = rows.start[row] + np.arange(len(row)) - rows.offset[row]
        fed = held[row].nonzero()[0]
        self._write(rows.slot[row[fed]], position[fed], tokens[self._index(fed)])

    def adjusts(self, slot: Ints, position: NDArray[Any]) -> bool:
        """Whether `adjust` would change anything."""
        return bool(self.adjusted(slot, position).any())

    def adjusted(self, slot: Ints, position: NDArray[Any]) -> Bools:
        """Entries [P] that `adjust` would change."""
        fields = self.fields.take(slot)
        changed: Bools = fields["adjusted"] | _ends_banned(fields, position)
        return changed

    def ends_banned(self, slot: Ints, position: NDArray[Any]) -> Bools:
        """Entries [P] in which fewer than min_tokens are generated."""
        return _ends_banned(self.fields.take(slot), position)

    def ban_step(self, slot: Ints, position: NDArray[Any]) -> None:
        """Notes in the token table what n-grams and words ban in slots [P], each at most once, after `position` [P]."""
        assert self.marks is not None
        ngram, words = self.fields["no_repeat_ngram_size"][slot], self._words.gather(slot)
        if self.history is not None and (ngram.any() or (words[1]["back"] > 0).any()):
            self.marks.ban_step(slot, position, self.history, ngram, words)

    def restricted(self, slot: Ints) -> Bools:
        """Entries [P] that may draw listed tokens only."""
        return self._allowed.any(slot)

    def failed(self, slot: Ints) -> Bools:
        """Slots [P] of requests whose processors failed in this step."""
        numbers = self.fields["processors"][slot]
        failures = [number for number in np.unique(numbers).tolist() if number in self._processors.failures]
        return np.isin(numbers, failures)

    def adjust(self, logits: Tensor, slot: Ints, position: NDArray[Any], scratch: Scratch, wanted: Bools | None = None) -> Tensor:
        """The stages before the temperature: bans, bias, penalties, the request's own processors.

        Returns fp32 [P, W], or `logits` itself where none applies. Inside a prompt nothing counts as generated.
        logits: floating [P, W], not modified. slot, position: [P], the last position that counts. Rows that are not `wanted`
        [P] may be left as they are; their processors are not called. Uses the buffer "adjusted".
        """
        if not self.adjusts(slot, position):
            return logits
        fields, length = self.fields[slot], position + 1
        ends_banned = _ends_banned(fields, position)
        ends, allowed, bias, words = (
            lists.gather(slot, wanted) for lists, wanted in zip(self._lists, (ends_banned, None, None, None), strict=True)
        )
        ngram = fields["no_repeat_ngram_size"]
        out = scratch.like("adjusted", logits, torch.float32).copy_(logits)
        tokens, length_held = self._histories(slot, np.where(fields["history"], length, 0))
        if len(allowed[0]):
            allow_tokens(out, *map(self._tensor, allowed), out=out)
        if len(ends[0]):
            ban_tokens(out, *map(self._tensor, ends), out=out)
        if len(words[0]):
            row, word = words
            ban_words(out, tokens, length_held, *map(self._tensor, (row, word["token"], word["back"])), out=out)
        if ngram.any():
            ban_repeated_ngrams(out, tokens, length_held, self._tensor(ngram), out=out)
        if len(bias[0]):
            row, item = bias
            apply_logit_bias(out, *map(self._tensor, (row, item["token"], item["bias"])), out=out)
        if fields["history"].any():
            names = ("prompt_len", "repetition_penalty", "frequency_penalty", "presence_penalty")
            apply_penalties(out, tokens, length_held, *(self._tensor(fields[name]) for name in names), out=out)
        processors = fields["processors"] if wanted is None else np.where(wanted, fields["processors"], 0)
        if processors.any():
            self._processors.apply(out, processors, slot, position, tokens)
        return out

    def _histories(self, slot: Ints, length: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Tokens [P, L] and the lengths [P] as tensors."""
        if self.history is None:
            return torch.empty(len(slot), 0, dtype=torch.int32, device=self._device), self._tensor(np.zeros_like(length))
        return self.history[:, : int(length.max())].index_select(0, self._index(slot)), self._tensor(length)

    def _write(self, slot: NDArray[Any], column: NDArray[Any], tokens: Tensor) -> None:
        """tokens: on the device."""
        if len(slot) == 0:
            return
        needed = int(column.max()) + 1
        have = 0 if self.history is None else self.history.shape[1]
        if needed > have:
            columns = max(needed, min(max(2 * have, _FIRST_COLUMNS), self._max_len))
            columns += -columns % _FIRST_COLUMNS  # a stride of one kind, for which kernels are compiled once
            grown = torch.zeros(len(self.fields), columns, dtype=torch.int32, device=self._device)
            if self.history is not None:
                grown[:, :have] = self.history
            self.history = grown
        assert self.history is not None
        self.history[self._index(slot), self._index(column)] = tokens.int()

    def _check(self, ids: NDArray[Any]) -> None:
        wrong = ids[(ids < 0) | (ids >= self._vocab_size)]
        if len(wrong):
            raise ValueError(f"token id {wrong[0]} is not in the vocabulary: ids are in [0, {self._vocab_size})")

    def _index(self, values: NDArray[Any]) -> Tensor:
        return upload_index(values, self._device)

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return upload(values, self._device)


def _ends_banned(fields: NDArray[Any], position: NDArray[Any]) -> Bools:
    """Rows in which fewer than min_tokens are generated."""
    generated = position + 1 - fields["prompt_len"]
    banned: Bools = (generated >= 0) & (generated < fields["min_tokens"])
    return banned

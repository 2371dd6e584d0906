"""Steps of sequences that nobody asked for: to measure what a step takes, and to have its kernels compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagefork.scheduler.plan import (
    LAST_TOKEN,
    Copies,
    Forks,
    Ints,
    Kind,
    Opens,
    Plan,
    Probe,
    Rows,
    Runner,
    Spec,
    Tables,
    ints,
)

DUMMY_BLOCKS = 17  # as many blocks as any steps need, block 0 included


class Span(NamedTuple):
    """A row: `length` tokens of a sequence from position `start` on."""

    start: int
    length: int


class DummySteps:
    """Makes plans that need nothing of other plans: each opens its slots and fills their tables.

    Row r is in slot r, and all sequences have the same blocks, over and over from block 1 on. So whatever their contexts, a
    few blocks serve. What those hold afterwards means nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, max_tokens: int, max_len: int) -> None:
        """num_blocks: those that are used, block 0 included. max_tokens: of a step; max_len: of a sequence."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_num_seqs, self.max_tokens, self.max_len = max_num_seqs, max_tokens, max_len
        self._step = 0

    def largest(self) -> list[Span]:
        """As many tokens as a step can have, in as many rows as it can have with them, behind contexts of full length."""
        spans, left = [], self.max_tokens
        for others in reversed(range(self.max_num_seqs)):
            count = max(1, min(self.max_len, left - others))
            spans.append(Span(self.max_len - count, count))
            left -= count
            if not left:
                break
        return spans

    def decoding(self, start: int | None = None, most: int | None = None) -> list[Span]:
        """One token for each of at most `most` sequences, at the end of the longest context or at `start`."""
        count = min(self.max_num_seqs, self.max_tokens, self.max_num_seqs if most is None else most)
        place = self.max_len - 1 if start is None else min(start, self.max_len - 1)
        return [Span(place, 1)] * count

    def plan(
        self,
        spans: Sequence[Span],
        spec: Spec | None = None,
        probes: Sequence[Probe] | None = None,
        forks: bool = False,
        trunk: bool = False,
    ) -> Plan:
        """A step of these rows, which draws after each unless `probes` are given.

        forks: slot 1 is forked from slot 0 and a block is copied before anything is computed. trunk: the rows are said to share
        the blocks before the earliest of them.
        """
        self._step += 1
        start, length = (ints(numbers) for numbers in zip(*spans, strict=True))
        slot, offset = ints(range(len(spans))), ints(np.cumsum([0, *length]))
        columns = [ints(np.arange(-(-stop // self.block_size))) for stop in (start + length).tolist()]
        column = np.concatenate(columns)
        shared = int(start.min()) // self.block_size
        nothing = ints(np.zeros(len(spans)))
        return Plan(
            step=self._step,
            specs=[spec or Spec(prompt_len=1)],
            forks=Forks(ints([0]), ints([1]), np.ones(1, np.int64)) if forks else Forks(ints(), ints(), np.empty(0, np.int64)),
            closes=ints(),
            opens=Opens(slot, nothing, slot.astype(np.int64), nothing, nothing, ints()),
            tables=Tables(ints(np.repeat(slot, [len(own) for own in columns])), column, self._block(column)),
            copies=Copies(ints([1]), ints([2])) if forks else Copies(ints(), ints()),
            rows=Rows(
                slot,
                start,
                offset,
                ints(np.where(np.repeat(length, length) == 1, LAST_TOKEN, 0)),
                ints([[0, len(spans), shared]] if trunk and shared and len(spans) > 1 else np.empty((0, 3))),
            ),
            probes=[draws(spans)] if probes is None else list(probes),
        )

    def _block(self, column: Ints) -> Ints:
        return ints(1 + column % (self.num_blocks - 1))


def ends(spans: Sequence[Span]) -> tuple[Ints, Ints]:
    """Where the last token of each row is, among all tokens, and the slots."""
    return ints(np.cumsum([span.length for span in spans]) - 1), ints(range(len(spans)))


def draws(spans: Sequence[Span]) -> Probe:
    """A token for every row."""
    return Probe(Kind.SAMPLE, *ends(spans))


def run(runner: Runner, plan: Plan) -> None:
    """One step, whose result nobody wants."""
    runner.submit(plan)
    runner.collect()

"""Executes plans on a model: the only place where the scheduler's arrays meet tensors."""

from __future__ import annotations

from collections import deque
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.similarity import similarity
from pagefork.kernels.upload import upload, upload_index
from pagefork.scheduler.plan import LAST_TOKEN, Ints, Kind, Plan, Probe, Result, Rows
from pagefork.scheduler.reading import joined

from .batch import build_batch
from .cache import KVCache
from .models.registry import Model
from .pending import Fetch, Pending
from .sampler import Sampler

_SLICE = 1 << 24  # most logits of prompt tokens held at once


class ModelRunner:
    """Keeps, by slot, what a plan takes for granted: the block table here, tokens and parameters in the sampler."""

    def __init__(
        self, model: Model, cache: KVCache, max_num_seqs: int, max_model_len: int, batch_invariant: bool = False
    ) -> None:
        self._model = model
        self._cache = cache
        self._batch_invariant = batch_invariant
        self._table = np.zeros((max_num_seqs, -(-max_model_len // cache.block_size)), np.int32)
        self._sampler = Sampler(max_num_seqs, model.config.vocab_size, max_model_len, cache.device)
        self.processors = self._sampler.processors
        self._results: deque[_Submitted] = deque()

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        """Compute a plan; its result waits for collect()."""
        self._table[plan.forks.dst] = self._table[plan.forks.src]
        self._sampler.fork(plan.forks)
        self._sampler.open(plan.opens, plan.specs)
        self._table[plan.tables.slot, plan.tables.column] = plan.tables.block
        self._cache.copy_blocks(plan.copies.src, plan.copies.dst)
        tokens = self._resolve(plan.rows)
        batch = build_batch(plan.rows, self._table, tokens, self._model.config, self._cache, self._batch_invariant)
        self._sampler.feed(plan.rows, tokens)
        hidden = self._model.forward(batch, self._cache)
        self._cache.write_hidden(hidden[: len(tokens)], batch.blocks, batch.offsets)
        self._results.append(_Submitted(plan.step, self._read(plan, hidden)))
        self._sampler.end_step()

    def collect(self) -> Result:
        """The result of the oldest plan that was not collected yet. Waits for the device."""
        return self._results.popleft().result()

    def reset(self) -> None:
        """Forget results of a step that failed."""
        self._results.clear()
        self._sampler.end_step()

    def _resolve(self, rows: Rows) -> Tensor:
        device = self._cache.device
        tokens = upload(rows.tokens.astype(np.int64), device)
        drawn = np.flatnonzero(rows.tokens == LAST_TOKEN)
        if len(drawn):
            slots = np.repeat(rows.slot, np.diff(rows.offset))[drawn]
            tokens[upload_index(drawn, device)] = self._sampler.last[upload_index(slots, device)]
        return tokens

    def _read(self, plan: Plan, hidden: Tensor) -> list[list[Pending]]:
        """Logits once for every position that any probe names; those of prompts a slice at a time, as there are many."""
        together = [probe for probe in plan.probes if probe.kind is not Kind.TARGET]
        reads = iter(self._read_together(together, plan.rows, hidden))
        return [
            self._read_sliced(probe, plan.rows, hidden) if probe.kind is Kind.TARGET else [next(reads)] for probe in plan.probes
        ]

    def _read_together(self, probes: list[Probe], rows: Rows, hidden: Tensor) -> list[Pending]:
        if not probes:
            return []
        places, row = np.unique(np.concatenate([probe.at for probe in probes]), return_inverse=True)
        logits, positions = self._logits(places, rows, hidden)
        reads, begin = [], 0
        for probe in probes:
            part = row[begin : begin + len(probe.at)]
            begin += len(probe.at)
            reads.append(self._sampler.read(logits, probe, part, positions[part]))
            if probe.window is not None:
                reads[-1].columns["sim"] = self._similarity(probe, rows, hidden)
        return reads

    def _similarity(self, probe: Probe, rows: Rows, hidden: Tensor) -> Tensor:
        assert self._cache.hidden is not None and probe.window is not None
        row, position = _places(probe.at, rows)
        tables = self._table[rows.slot[row], : -(-int(position.max()) // self._cache.block_size) + 1]
        states = hidden[upload_index(probe.at, hidden.device)]
        host = (torch.from_numpy(values.astype(np.int64)) for values in (tables, position, probe.window))
        return similarity(states, self._cache.hidden, *host)

    def _read_sliced(self, probe: Probe, rows: Rows, hidden: Tensor) -> list[Pending]:
        size = max(1, _SLICE // self._model.config.vocab_size)
        parts: list[Pending] = []
        for begin in range(0, len(probe.at), size):
            cut = slice(begin, begin + size)
            assert probe.target is not None
            part = Probe(probe.kind, probe.at[cut], probe.slot[cut], probe.n, target=probe.target[cut])
            logits, positions = self._logits(part.at, rows, hidden)
            parts.append(self._sampler.read(logits, part, np.arange(len(part.at)), positions))
        return parts

    def _logits(self, places: Ints, rows: Rows, hidden: Tensor) -> tuple[Tensor, Ints]:
        """Logits at flat token indices, and the positions of their tokens."""
        logits = self._model.logits(hidden[upload_index(places, hidden.device)])
        return logits, _places(places, rows)[1]


class _Submitted:
    """A step whose reads are under way: those of each probe, in one or more parts."""

    def __init__(self, step: int, probes: list[list[Pending]]) -> None:
        self._step, self._counts = step, [len(parts) for parts in probes]
        self._fetch = Fetch(list(chain.from_iterable(probes)))

    def result(self) -> Result:
        reads = iter(self._fetch.reads())
        probes = [list(islice(reads, count)) for count in self._counts]
        return Result(self._step, [parts[0] if len(parts) == 1 else joined(parts) for parts in probes])


def _places(at: Ints, rows: Rows) -> tuple[NDArray[Any], Ints]:
    """The rows that flat token indices belong to, and the positions of their tokens."""
    row = np.searchsorted(rows.offset, at, side="right") - 1
    position: Ints = rows.start[row] + at - rows.offset[row]
    return row, position

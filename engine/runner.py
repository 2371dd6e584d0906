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
from pagefork.kernels.upload import upload_index
from pagefork.scheduler.plan import Ints, Kind, Plan, Probe, Result, Rows
from pagefork.scheduler.reading import joined

from .batch import build_batch
from .block_tables import BlockTables
from .cache import KVCache
from .capture import Capture
from .forward import Forward
from .graph import StepGraphs
from .models.registry import Model
from .pending import Fetch, Pending
from .sampler import Sampler

_SLICE = 1 << 24  # most logits of prompt tokens held at once


class ModelRunner:
    """Keeps, by slot, what a plan takes for granted: the block table here, tokens and parameters in the sampler."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        max_num_seqs: int,
        max_model_len: int,
        batch_invariant: bool = False,
        capture: Capture | None = None,
    ) -> None:
        """capture: records decoding steps, to replay them; where kernels run. Raises as StepGraphs does."""
        self._model = model
        self._cache = cache
        self._batch_invariant = batch_invariant
        self._tables = BlockTables(max_num_seqs, -(-max_model_len // cache.block_size), cache.device)
        self._sampler = Sampler(max_num_seqs, model.config.vocab_size, max_model_len, cache.device)
        self.processors = self._sampler.processors
        self._results: deque[_Submitted] = deque()
        self._graphs: StepGraphs | None = None
        if capture is not None:
            parts = model, cache, self._tables, self._sampler
            with torch.inference_mode():
                self._graphs = StepGraphs(*parts, max_len=max_model_len, batch_invariant=batch_invariant, capture=capture)

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        """Compute a plan; its result waits for collect()."""
        with _current(self._cache.device):
            self._submit(plan)

    def _submit(self, plan: Plan) -> None:
        self._tables.fork(plan.forks)
        self._sampler.fork(plan.forks)
        self._sampler.open(plan.opens, plan.specs)
        self._tables.write(plan.tables)
        self._cache.copy_blocks(plan.copies.src, plan.copies.dst)
        forward = self._graphs.run(plan) if self._graphs is not None else None
        if forward is None:
            forward = self._launched(plan.rows)
        self._sampler.feed(plan.rows, forward.tokens[: len(plan.rows.tokens)])
        self._results.append(_Submitted(plan.step, self._read(plan, forward), self._cache.device))
        self._sampler.end_step()

    def collect(self) -> Result:
        """The result of the oldest plan that was not collected yet. Waits for the device."""
        return self._results.popleft().result()

    def reset(self) -> None:
        """Forget results of a step that failed."""
        self._results.clear()
        self._sampler.end_step()

    def _launched(self, rows: Rows) -> Forward:
        batch = build_batch(
            rows,
            self._tables.host,
            self._model.config,
            self._cache,
            last=self._sampler.last,
            device_tables=self._tables.device,
            batch_invariant=self._batch_invariant,
        )
        hidden = self._model.forward(batch, self._cache)
        return Forward(batch.tokens, hidden)

    def _read(self, plan: Plan, forward: Forward) -> list[list[Pending]]:
        """Logits once for every position that any probe names; those of prompts a slice at a time, as there are many."""
        together = [probe for probe in plan.probes if probe.kind is not Kind.TARGET]
        reads = iter(self._read_together(together, plan.rows, forward))
        return [
            self._read_sliced(probe, plan.rows, forward) if probe.kind is Kind.TARGET else [next(reads)] for probe in plan.probes
        ]

    def _read_together(self, probes: list[Probe], rows: Rows, forward: Forward) -> list[Pending]:
        if not probes:
            return []
        at = probes[0].at if len(probes) == 1 else np.concatenate([probe.at for probe in probes])
        logits, row = forward.logits, at
        if logits is None:
            places, row = _distinct(at)
            logits = self._logits(places, forward)
        position, reads, begin = _places(at, rows)[1], [], 0
        for probe in probes:
            part = slice(begin, begin + len(probe.at))
            begin += len(probe.at)
            drawn = forward.drawn if probe.kind is Kind.SAMPLE else None
            reads.append(self._sampler.read(logits, probe, row[part], position[part], drawn))
            if probe.window is not None:
                reads[-1].columns["sim"] = self._similarity(probe, rows, forward.hidden)
        return reads

    def _similarity(self, probe: Probe, rows: Rows, hidden: Tensor) -> Tensor:
        assert self._cache.hidden is not None and probe.window is not None
        row, position = _places(probe.at, rows)
        tables = self._tables.host[rows.slot[row], : -(-int(position.max()) // self._cache.block_size) + 1]
        states = hidden[upload_index(probe.at, hidden.device)]
        host = (torch.from_numpy(values.astype(np.int64)) for values in (tables, position, probe.window))
        return similarity(states, self._cache.hidden, *host)

    def _read_sliced(self, probe: Probe, rows: Rows, forward: Forward) -> list[Pending]:
        size = max(1, _SLICE // self._model.config.vocab_size)
        parts: list[Pending] = []
        for begin in range(0, len(probe.at), size):
            cut = slice(begin, begin + size)
            assert probe.target is not None
            part = Probe(probe.kind, probe.at[cut], probe.slot[cut], probe.n, target=probe.target[cut])
            logits, position = self._logits(part.at, forward), _places(part.at, rows)[1]
            parts.append(self._sampler.read(logits, part, np.arange(len(part.at)), position))
        return parts

    def _logits(self, places: Ints, forward: Forward) -> Tensor:
        """Logits at flat token indices."""
        hidden = forward.hidden
        if len(places) < len(hidden) or not _ascends(places):
            hidden = hidden[upload_index(places, hidden.device)]
        return self._model.logits(hidden)


class _Submitted:
    """A step whose reads are under way: those of each probe, in one or more parts."""

    def __init__(self, step: int, probes: list[list[Pending]], device: torch.device) -> None:
        self._step, self._counts = step, [len(parts) for parts in probes]
        self._fetch = Fetch(list(chain.from_iterable(probes)), device)

    def result(self) -> Result:
        reads = iter(self._fetch.reads())
        probes = [list(islice(reads, count)) for count in self._counts]
        return Result(self._step, [parts[0] if len(parts) == 1 else joined(parts) for parts in probes])


def _current(device: torch.device) -> torch.cuda.device:
    """Makes a GPU the current one, which is where Triton launches: a thread that did not build the engine may have another."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)


def _distinct(at: Ints) -> tuple[Ints, NDArray[Any]]:
    """The different indices in ascending order, and which of them each is."""
    if _ascends(at):
        return at, np.arange(len(at))
    places, row = np.unique(at, return_inverse=True)
    return places, row


def _ascends(at: Ints) -> bool:
    return bool((at[1:] > at[:-1]).all())


def _places(at: Ints, rows: Rows) -> tuple[NDArray[Any], Ints]:
    """The rows that flat token indices belong to, and the positions of their tokens."""
    if len(rows.tokens) == len(rows.slot):  # a token each
        return at, rows.start[at]
    row = np.searchsorted(rows.offset, at, side="right") - 1
    position: Ints = rows.start[row] + at - rows.offset[row]
    return row, position

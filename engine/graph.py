"""Decoding steps that are replayed: everything that a step of one token per row launches, recorded once per size.

A step takes the graph of the smallest bucket that has room for its rows; the rest is padding, which is written to
block 0 and read by nobody. Its arrays are copied into buffers that the graph reads: the tokens, where they go, and
what attention has to do, of which a graph does as much as it is told. What a graph gives is overwritten by the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pagefork.kernels.attention_tasks import SPLIT
from pagefork.kernels.entries import WORDS
from pagefork.kernels.linear import padded_rows
from pagefork.kernels.task_attention import fixed_programs, workspace
from pagefork.kernels.upload import staging
from pagefork.scheduler.errors import ConfigError, ModelError, PageforkError
from pagefork.scheduler.plan import Kind, Plan, Rows, ints

from .batch import task_batch
from .block_tables import BlockTables
from .cache import KVCache
from .capture import Capture
from .forward import Forward
from .fused_draw import DrawEntries, draw_entries
from .probe_entries import neutral_records
from .sampler import Sampler
from .step_arrays import Layout, StepArrays, step_arrays, step_shapes

if TYPE_CHECKING:
    from .models.config import ModelConfig
    from .models.registry import Model

_READERS = 4  # of every key of a full cache for which graphs have room
MOST_ROWS = 512  # larger steps take so long that launching them does not count
_NO_TRUNK = np.empty((0, 3), np.int32)


class ReadOut(Enum):
    """What a graph reads off the logits."""

    NONE = "none"
    PLAIN = "plain"  # it draws where no entry has limits
    FILTERED = "filtered"  # it draws with top-k, top-p or min-p


class _Graph(NamedTuple):
    replay: Callable[[], None]
    found: Forward


def buckets(most: int) -> list[int]:
    """Sizes of graphs, for up to `most` rows: the coarser the larger, so that padding costs at most a third from 8 on."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 64, 16), *range(64, 256, 32), *range(256, MOST_ROWS + 1, 64)]
    most = min(most, MOST_ROWS)
    return [*(size for size in sizes if size < most), most]


def most_parts(bucket: int, cache_tokens: int, max_len: int) -> int:
    """How many partial results of attention the graph of a bucket has room for; tasks there are no more than that.

    Forks read the keys that they share each for itself: there is room for more than the cache holds.
    """
    return min(_READERS * cache_tokens // SPLIT + 2 * bucket, bucket * -(-max_len // SPLIT))


def graph_bytes(config: ModelConfig, dtype: torch.dtype, max_num_seqs: int, max_len: int, cache_tokens: int) -> int:
    """About how much memory graphs take: their buffers, and what a step of their largest bucket works in."""
    sizes = buckets(max_num_seqs)
    largest, rows = sizes[-1], sum(sizes)
    heads = config.num_attention_heads
    partials = most_parts(largest, cache_tokens, max_len) * heads * (config.head_dim + 2) * 4
    logits = 2 * largest * config.vocab_size * dtype.itemsize
    records = rows * 3 * config.vocab_size // 2  # 2 * 8 bytes for 64 tokens, twice, and what draws work in
    states = (rows * 3 + largest * 32) * config.hidden_size * dtype.itemsize
    return partials + logits + records + states + len(sizes) * 3 * (2 << 20)


class StepGraphs:
    """Graphs of a model over its cache, for every bucket and read-out; recorded as this is made.

    Raises ConfigError where memory does not suffice, ModelError where a model can't be recorded.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        tables: BlockTables,
        sampler: Sampler,
        *,
        max_len: int,
        batch_invariant: bool,
        capture: Capture,
    ) -> None:
        assert tables.device is not None
        self._model, self._cache, self._tables, self._sampler = model, cache, tables, sampler
        self._walked: Tensor = tables.device
        self._batch_invariant = batch_invariant
        sizes = {padded_rows(size, cache.device) for size in buckets(len(tables.host))}
        self._buckets = sorted(sizes)
        self._room = {size: most_parts(size, cache.num_blocks * cache.block_size, max_len) for size in sizes}
        self._idle = {size: self._arrays(_idle_rows(size), size) for size in sizes}
        self._layouts = {size: self._layout(size) for size in sizes}
        words = max(layout.words for layout in self._layouts.values())
        self._sent = torch.zeros(words, dtype=torch.int32, device=cache.device)
        heads, head_dim = model.config.num_attention_heads, model.config.head_dim
        self._workspace = workspace(max(self._room.values()), heads, head_dim, cache.device)
        self._programs = fixed_programs(cache.device)
        self._logits: Tensor | None = None  # [largest bucket, vocabulary]
        self._graphs: dict[tuple[int, ReadOut], _Graph] = {}
        for size in reversed(self._buckets):
            for readout in ReadOut:
                self._graphs[size, readout] = self._recorded(size, readout, capture)

    def run(self, plan: Plan) -> Forward | None:
        """Computes a plan's rows, and draws for its SAMPLE where it can. None where no graph fits; nothing is launched then."""
        count = len(plan.rows.tokens)
        if count != len(plan.rows.slot) or count > self._buckets[-1]:
            return None
        size = self._buckets[bisect_left(self._buckets, count)]
        step = self._arrays(plan.rows, size)
        if not self._fits(step):
            return None
        asked = self._asked(plan, size)
        graph = self._graphs[size, _readout(asked)]
        self._send(step, asked)
        graph.replay()
        return graph.found

    def _fits(self, step: StepArrays) -> bool:
        room, idle = self._room[step.padded], self._idle[step.padded]
        same = all(found.rows == idle.tasks[window].rows for window, found in step.tasks.items())
        return same and max(step.parts, step.records) <= room

    def _asked(self, plan: Plan, size: int) -> DrawEntries | None:
        """What the SAMPLE of a plan draws, where a graph can."""
        probes = [probe for probe in plan.probes if probe.kind is Kind.SAMPLE]
        if len(probes) != 1 or len(probes[0].at) > size:
            return None
        return self._sampler.draw_entries(probes[0], probes[0].at, plan.rows.start[probes[0].at])

    def _send(self, step: StepArrays, asked: DrawEntries | None) -> None:
        """Puts the arrays of a step where its graph reads them. The host does not wait."""
        layout, arrays = self._layouts[step.padded], step.arrays
        if asked is not None:
            arrays = arrays | asked.arrays(step.padded, nobody=len(self._tables.host))
        host = staging(layout.words, self._cache.device)
        used = layout.write(host.numpy(), arrays)
        self._sent[:used].copy_(host[:used], non_blocking=True)

    def _arrays(self, rows: Rows, size: int) -> StepArrays:
        config, block_size = self._model.config, self._cache.block_size
        return step_arrays(rows, self._tables.host, config, block_size, size, self._batch_invariant)

    def _layout(self, size: int) -> Layout:
        windows = len(self._idle[size].tasks)
        entries = {"entries": (size, WORDS), "entry_slots": (size,)}
        return Layout(step_shapes(windows, size, [self._room[size]] * windows, **entries))

    def _recorded(self, size: int, readout: ReadOut, capture: Capture) -> _Graph:
        """The graph of a bucket, recorded with tokens that are written to block 0 and entries that say nothing."""
        self._send(self._idle[size], DrawEntries(neutral_records(0), ints()))
        try:
            return _Graph(*capture(lambda: self._launched(size, readout)))
        except PageforkError:
            raise
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise ConfigError(
                    f"there is not enough memory for graphs of {size} rows: lower max_num_seqs or the memory of the cache, "
                    "or set cuda_graphs=False"
                ) from error
            raise ModelError(
                f"{self._model.config.architecture} can't be recorded as CUDA graphs ({error}): set cuda_graphs=False"
            ) from error

    def _launched(self, size: int, readout: ReadOut) -> Forward:
        """A step of a bucket, by the arrays that were sent."""
        sent = self._layouts[size].views(self._sent)
        batch = task_batch(
            self._idle[size],
            sent,
            self._sampler.held,
            self._walked,
            self._workspace,
            self._batch_invariant,
            programs=self._programs,
        )
        hidden = self._model.forward(batch, self._cache)
        logits = self._model.logits(hidden)
        if self._logits is None:  # the largest bucket comes first, and is run before it is recorded
            self._logits = torch.empty_like(logits)
        # All graphs share one place: otherwise the logits of each were kept.
        kept = self._logits[:size].copy_(logits)
        if readout is ReadOut.NONE:
            return Forward(batch.tokens, hidden, kept)
        drawn = draw_entries(kept, sent["entries"], sent["entry_slots"], self._sampler.held, readout is ReadOut.FILTERED)
        return Forward(batch.tokens, hidden, kept, drawn)


def _readout(asked: DrawEntries | None) -> ReadOut:
    if asked is None:
        return ReadOut.NONE
    return ReadOut.FILTERED if asked.filtered else ReadOut.PLAIN


def _idle_rows(size: int) -> Rows:
    """The first token of slot 0, whose table names block 0 as long as nothing has run, so many times."""
    nothing = np.zeros(size, np.int32)
    return Rows(nothing, nothing, ints(range(size + 1)), nothing, _NO_TRUNK)

"""What a forward needs of a plan's rows, worked out once per step for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pagefork.kernels._triton import fused_on
from pagefork.kernels.linear import padded_rows
from pagefork.kernels.paged_attention import Index, index_attention
from pagefork.kernels.task_attention import TaskIndex, workspace
from pagefork.kernels.upload import staging, upload, upload_index
from pagefork.scheduler.plan import LAST_TOKEN, Ints, Rows
from pagefork.step_arrays import Layout, StepArrays, check_rows, step_arrays

if TYPE_CHECKING:
    from pagefork.cache import KVCache
    from pagefork.models.config import ModelConfig


class Batch(Protocol):
    """T tokens, padded to N rows so that linear layers of torch give the same bits for any number of rows.

    W is T on a CPU; where kernels run it is N, and padding is written to block 0.
    """

    @property
    def tokens(self) -> Tensor:
        """int64 [N]"""

    @property
    def positions(self) -> Tensor:
        """int64 [N]"""

    @property
    def blocks(self) -> Tensor:
        """int64 or int32 [W] where keys and values are written."""

    @property
    def offsets(self) -> Tensor:
        """int64 or int32 [W] and where in the block."""

    @property
    def begun(self) -> Tensor:
        """int64, blocks that are begun in this step and not filled; none where no kernel reads what lies behind."""

    @property
    def attention(self) -> Mapping[int | None, Index]:
        """By sliding window."""


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A Batch whose tensors are on a device."""

    tokens: Tensor
    positions: Tensor
    blocks: Tensor
    offsets: Tensor
    begun: Tensor
    attention: dict[int | None, Index]


class HostBatch:
    """A Batch on a CPU: the rows of a plan, which is all that a native step takes. The rest is worked out when asked for."""

    def __init__(
        self, rows: Rows, tables: Ints, config: ModelConfig, cache: KVCache, last: Tensor | None, batch_invariant: bool
    ) -> None:
        """As in build_batch."""
        self.rows, self.tables, self.last = rows, tables, last
        self._length, self._count = check_rows(rows, tables, cache.block_size)
        self._config, self._batch_invariant = config, batch_invariant
        self._block_size, self._dtype, self._device = cache.block_size, cache.k.dtype, cache.device

    @cached_property
    def tokens(self) -> Tensor:
        tokens = _resolved(self.rows, self.last, self._device)
        return functional.pad(tokens, (0, self._padding))

    @cached_property
    def positions(self) -> Tensor:
        return upload_index(np.pad(self._positions, (0, self._padding)), self._device)

    @cached_property
    def blocks(self) -> Tensor:
        return upload_index(self._blocks, self._device)

    @cached_property
    def offsets(self) -> Tensor:
        return upload_index(self._positions % self._block_size, self._device)

    @cached_property
    def begun(self) -> Tensor:
        start, size = self.rows.start, self._block_size
        stop = start + self._length  # of a row's last block, which begins at a multiple of its size
        begun = (stop % size > 0) & (stop // size * size >= start)
        return upload_index(self._blocks[self.rows.offset[1:] - 1][begun], self._device)

    @cached_property
    def attention(self) -> dict[int | None, Index]:
        config, block_size = self._config, self._block_size
        reach = -(-int((self.rows.start + self._length).max()) // block_size)
        return {
            window: index_attention(
                self.tables[self.rows.slot, :reach],
                self.rows.start,
                self._length,
                heads=config.num_attention_heads,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size=block_size,
                window=window,
                dtype=self._dtype,
                device=self._device,
                batch_invariant=self._batch_invariant,
            )
            for window in dict.fromkeys(config.windows)
        }

    @property
    def _padding(self) -> int:
        return padded_rows(self._count, self._device) - self._count

    @cached_property
    def _positions(self) -> NDArray[np.int64]:
        return np.arange(self._count) + np.repeat(self.rows.start - self.rows.offset[:-1], self._length)

    @cached_property
    def _blocks(self) -> Ints:
        found: Ints = self.tables[np.repeat(self.rows.slot, self._length), self._positions // self._block_size]
        return found


def build_batch(
    rows: Rows,
    tables: Ints,
    config: ModelConfig,
    cache: KVCache,
    *,
    last: Tensor | None = None,
    device_tables: Tensor | None = None,
    batch_invariant: bool = False,
) -> Batch:
    """The batch of a step.

    tables: the block table of every slot, int32 [slots, columns]; device_tables: the same on the cache's device, where
    kernels walk it (None: it is sent there). last: int64 [slots] on the device, what each slot drew last, for the
    tokens that are LAST_TOKEN. batch_invariant: as in `index_attention`. Raises ValueError if a row has no tokens,
    outgrows its table, or if there are no rows.
    """
    if fused_on(cache.device):
        padded = padded_rows(len(rows.tokens), cache.device)
        step = step_arrays(rows, tables, config, cache.block_size, padded, batch_invariant)
        drawn = last if (rows.tokens == LAST_TOKEN).any() else None
        walked = upload(tables, cache.device) if device_tables is None else device_tables
        room = workspace(step.parts, config.num_attention_heads, config.head_dim, cache.device)
        return task_batch(step, _sent(step, cache.device), drawn, walked, room, batch_invariant)
    return HostBatch(rows, tables, config, cache, last, batch_invariant)


def _resolved(rows: Rows, last: Tensor | None, device: torch.device) -> Tensor:
    """The tokens of rows, int64 [T], those that are LAST_TOKEN from `last`."""
    tokens = upload(rows.tokens.astype(np.int64), device)
    drawn = np.flatnonzero(rows.tokens == LAST_TOKEN)
    if len(drawn):
        assert last is not None
        slots = np.repeat(rows.slot, np.diff(rows.offset))[drawn]
        tokens[upload_index(drawn, device)] = last[upload_index(slots, device)]
    return tokens


def _sent(step: StepArrays, device: torch.device) -> dict[str, Tensor]:
    """The arrays of a step on the device, in one upload."""
    layout = Layout({name: array.shape for name, array in step.arrays.items()})
    host = staging(layout.words, device)
    layout.write(host.numpy(), step.arrays)
    return layout.views(host.to(device, non_blocking=True))


def task_batch(
    step: StepArrays,
    sent: dict[str, Tensor],
    last: Tensor | None,
    tables: Tensor,
    room: tuple[Tensor, Tensor],
    batch_invariant: bool,
    programs: int | None = None,
) -> Batch:
    """The batch of a step whose arrays are on the device. Launches what it takes, and waits for nothing.

    sent: as `step_shapes` has them, with room for any number of records; last: int64 [slots], None where no token is
    LAST_TOKEN; tables: int32 [slots, columns]; room: a `workspace` for the partial results of one layer; programs: as in
    TaskIndex.
    """
    tokens, slots, positions = sent["tokens"], sent["slots"], sent["positions"]
    attention: dict[int | None, Index] = {
        window: TaskIndex(
            tokens=step.tokens,
            window=window,
            count=sent["count"][i : i + 1],
            records=sent[f"records{i}"],
            part=sent[f"part{i}"],
            positions=positions,
            table=tables,
            rows=tasks.rows,
            invariant=batch_invariant,
            programs=programs,
            partial=room[0],
            state=room[1],
        )
        for i, (window, tasks) in enumerate(step.tasks.items())
    }
    return DeviceBatch(
        tokens=tokens.long() if last is None else torch.where(tokens < 0, last.index_select(0, slots), tokens),
        positions=positions.long(),
        blocks=sent["blocks"],
        offsets=sent["offsets"],
        begun=positions.new_empty(0, dtype=torch.int64),
        attention=attention,
    )

"""What a forward needs of a plan's rows, worked out once per step for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pagefork.kernels._triton import fused_on
from pagefork.kernels.linear import padded_rows
from pagefork.kernels.paged_attention import AttentionIndex, index_attention
from pagefork.kernels.task_attention import TaskIndex, workspace
from pagefork.kernels.upload import staging, upload, upload_index
from pagefork.scheduler.plan import LAST_TOKEN, Ints, Rows
from pagefork.step_arrays import Layout, StepArrays, check_rows, step_arrays

if TYPE_CHECKING:
    from pagefork.cache import KVCache
    from pagefork.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens, padded to N rows so that linear layers give the same bits for any number of rows.

    W is T on a CPU; where kernels run it is N, and padding is written to block 0.
    """

    tokens: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    blocks: Tensor  # int64 or int32 [W] where keys and values are written
    offsets: Tensor  # int64 or int32 [W] and where in the block
    begun: Tensor  # int64, blocks that are begun in this step and not filled; none where no kernel reads what lies behind
    attention: dict[int | None, AttentionIndex | TaskIndex]  # by sliding window


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
    length, count = check_rows(rows, tables, cache.block_size)
    device, block_size = cache.device, cache.block_size
    reach = -(-int((rows.start + length).max()) // block_size)
    own = tables[rows.slot, :reach]
    attention: dict[int | None, AttentionIndex | TaskIndex] = {
        window: index_attention(
            own,
            rows.start,
            length,
            heads=config.num_attention_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            window=window,
            dtype=cache.k.dtype,
            device=device,
            batch_invariant=batch_invariant,
        )
        for window in dict.fromkeys(config.windows)
    }
    positions = np.arange(count) + np.repeat(rows.start - rows.offset[:-1], length)
    blocks = own[np.repeat(np.arange(len(length)), length), positions // block_size]
    stop = rows.start + length  # of a row's last block, which begins at a multiple of block_size
    begun = (stop % block_size > 0) & (stop // block_size * block_size >= rows.start)
    padding = padded_rows(count, device) - count
    return Batch(
        tokens=functional.pad(_resolved(rows, last, device), (0, padding)),
        positions=upload_index(np.pad(positions, (0, padding)), device),
        blocks=upload_index(blocks, device),
        offsets=upload_index(positions % block_size, device),
        begun=upload_index(blocks[rows.offset[1:] - 1][begun], device),
        attention=attention,
    )


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
    attention: dict[int | None, AttentionIndex | TaskIndex] = {
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
    return Batch(
        tokens=tokens.long() if last is None else torch.where(tokens < 0, last.index_select(0, slots), tokens),
        positions=positions.long(),
        blocks=sent["blocks"],
        offsets=sent["offsets"],
        begun=positions.new_empty(0, dtype=torch.int64),
        attention=attention,
    )

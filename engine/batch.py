"""What a forward needs of a plan's rows, worked out once per step for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pagefork.kernels.linear import MIN_ROWS
from pagefork.kernels.paged_attention import AttentionIndex, index_attention
from pagefork.scheduler.plan import Ints, Rows

if TYPE_CHECKING:
    from pagefork.cache import KVCache
    from pagefork.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens, padded to N rows so that linear layers give the same bits for any number of rows."""

    tokens: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    blocks: Tensor  # int64 [T] where keys and values are written
    offsets: Tensor  # int64 [T] and where in the block
    begun: Tensor  # int64, blocks that are begun in this step and not filled
    attention: dict[int | None, AttentionIndex]  # by sliding window


def build_batch(
    rows: Rows, tables: Ints, tokens: Tensor, config: ModelConfig, cache: KVCache, batch_invariant: bool = False
) -> Batch:
    """The batch of a step.

    tables: the block table of every slot, int32 [slots, columns]; tokens: int64 [T] on the cache's device, those of
    `rows` with LAST_TOKEN replaced by what the slot drew; batch_invariant: as in `index_attention`. Raises ValueError
    if a row has no tokens, outgrows its table, or if there are no rows.
    """
    length = np.diff(rows.offset)
    count = int(rows.offset[-1])
    if not len(length) or tokens.shape != (count,):
        raise ValueError(f"{len(length)} rows of {count} tokens in all, but {list(tokens.shape)} tokens are given")
    device, block_size = cache.device, cache.block_size
    reach = -(-int((rows.start + length).max()) // block_size)
    own = tables[rows.slot, :reach]
    attention = {
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
    padding = max(0, MIN_ROWS - count)
    return Batch(
        tokens=functional.pad(tokens, (0, padding)),
        positions=_to(np.pad(positions, (0, padding)), device),
        blocks=_to(blocks, device),
        offsets=_to(positions % block_size, device),
        begun=_to(blocks[rows.offset[1:] - 1][begun], device),
        attention=attention,
    )


def _to(array: np.ndarray[tuple[int, ...], np.dtype[np.signedinteger]], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)

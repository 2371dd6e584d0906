"""A model fed rows directly, over block tables in random order and a cache that is full of NaN."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagefork.batch import build_batch
from pagefork.cache import KVCache
from pagefork.models.registry import Model
from pagefork.scheduler.plan import Rows, ints


class Feeder:
    """`feed` computes any tokens of any slots; a slot keeps what it was fed."""

    def __init__(
        self, model: Model, slots: int = 8, length: int = 320, block_size: int = 16, batch_invariant: bool = False
    ) -> None:
        columns = -(-length // block_size)
        self.model = model
        self.batch_invariant = batch_invariant
        self.cache = KVCache(model.config, slots * columns + 1, block_size, model.dtype, model.device)
        self.cache.k.fill_(torch.nan)
        self.cache.v.fill_(torch.nan)
        order = np.random.default_rng(slots).permutation(slots * columns) + 1
        self.tables = order.reshape(slots, columns).astype(np.int32)

    def feed(self, rows: list[tuple[int, int, list[int]]]) -> list[Tensor]:
        """For rows (slot, start, tokens): logits [tokens, vocabulary] of each."""
        slots, starts, tokens = zip(*rows, strict=True)
        flat = ints([token for row in tokens for token in row])
        offset = ints(np.cumsum([0, *map(len, tokens)]))
        plan = Rows(ints(slots), ints(starts), offset, flat, np.empty((0, 3), np.int32))
        batch = build_batch(plan, self.tables, self.model.config, self.cache, batch_invariant=self.batch_invariant)
        hidden = self.model.forward(batch, self.cache)
        return list(self.model.logits(hidden[: len(flat)]).split([len(row) for row in tokens]))

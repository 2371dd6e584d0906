"""Sequences in a paged cache, their attention by tasks, and the same densely in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagefork.kernels.attention_tasks import plan_tasks
from pagefork.kernels.paged_attention import paged_attention
from pagefork.kernels.task_attention import TaskIndex, workspace


@dataclass
class Pages:
    """A cache of `slots` sequences of up to `length` tokens, in blocks of no order; everything behind their ends is NaN.

    The first `shared` blocks are the same for all.
    """

    heads: int
    kv_heads: int
    size: int
    lengths: Sequence[int]
    value_size: int = 0
    block_size: int = 16
    shared: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    def __post_init__(self) -> None:
        self.value_size = self.value_size or self.size
        generator = torch.Generator().manual_seed(self.seed)
        slots, columns = len(self.lengths), -(-max(self.lengths) // self.block_size) + 1
        blocks = torch.randperm(slots * columns, generator=generator).view(slots, columns)
        blocks[:, : self.shared] = blocks[0, : self.shared]
        k = torch.full((slots * columns, self.kv_heads, self.size, self.block_size), torch.nan)
        v = torch.full((slots * columns, self.kv_heads, self.block_size, self.value_size), torch.nan)
        self.keys, self.values = [], []  # [length, KV heads, size] of every slot, as stored
        for slot, length in enumerate(self.lengths):
            position = torch.arange(length)
            block, offset = blocks[slot, position // self.block_size], position % self.block_size
            fresh = slice(self.shared * self.block_size if slot else 0, None)
            own = block[fresh], offset[fresh]
            k.permute(0, 3, 1, 2)[own] = torch.randn(len(own[0]), self.kv_heads, self.size, generator=generator)
            v.transpose(1, 2)[own] = torch.randn(len(own[0]), self.kv_heads, self.value_size, generator=generator)
            self.keys.append(k.permute(0, 3, 1, 2)[block, offset].to(self.dtype))
            self.values.append(v.transpose(1, 2)[block, offset].to(self.dtype))
        self.queries = [torch.randn(length, self.heads, self.size, generator=generator).to(self.dtype) for length in self.lengths]
        self.k, self.v = k.to(self.device, self.dtype), v.to(self.device, self.dtype)
        self.table = blocks.to(self.device, torch.int32)

    def attend(
        self,
        rows: Sequence[tuple[int, int, int]],
        *,
        trunk: Sequence[tuple[int, int, int]] = (),
        window: int | None = None,
        invariant: bool = False,
        split: int = 32,
        padding: int = 0,
        programs: int | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """[tokens, H, m] of each row (slot, start, length); the padding is checked to be zero."""
        slot, start, length = np.array(rows, np.int32).T
        given = np.array(trunk, np.int32).reshape(-1, 3)
        group = self.heads // self.kv_heads
        tasks = plan_tasks(
            slot, start, length, given, group=group, block_size=self.block_size, window=window, invariant=invariant, split=split
        )
        count = int(length.sum())
        q = torch.cat([self.queries[s][x : x + n] for s, x, n in rows])
        fused = torch.randn(count + padding, self.heads + 3, self.size).to(self.dtype)  # queries lie between keys and values
        fused[:count, 1:-2] = q
        positions = np.concatenate([np.arange(x, x + n) for _, x, n in rows] + [np.zeros(padding, np.int64)])
        partial, state = workspace(int(tasks.part[-1]), self.heads, self.value_size, self.device)
        partial.fill_(torch.nan)
        index = TaskIndex(
            tokens=count,
            window=window,
            count=torch.tensor([len(tasks.records)], dtype=torch.int32, device=self.device),
            records=torch.from_numpy(tasks.records).to(self.device),
            part=torch.from_numpy(np.pad(tasks.part, (0, padding), constant_values=-1)).to(self.device),
            positions=torch.from_numpy(positions).to(self.device, torch.int32),
            table=self.table,
            rows=tasks.rows,
            invariant=invariant,
            programs=programs,
            partial=partial,
            state=state,
            split=split,
        )
        queries = fused.to(self.device)[:, 1:-2]
        out = paged_attention(queries, self.k, self.v, index, self.size**-0.5, **options)
        out = out.view(count + padding, self.heads, self.value_size).cpu()
        assert not out[count:].any()
        return list(out[:count].split(length.tolist()))

    def dense(
        self,
        slot: int,
        start: int,
        length: int,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One row in float64."""
        group = self.heads // self.kv_heads
        q = self.queries[slot][start : start + length].double()
        k = self.keys[slot][: start + length].double().repeat_interleave(group, 1)
        v = self.values[slot][: start + length].double().repeat_interleave(group, 1)
        score = torch.einsum("thd,jhd->htj", q, k) * self.size**-0.5
        if softcap is not None:
            score = softcap * (score / softcap).tanh()
        position, key = torch.arange(start, start + length)[:, None], torch.arange(start + length)[None]
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        score = score.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            score = torch.cat((score, sinks.cpu().double()[:, None, None].expand(-1, length, 1)), -1)
        return torch.einsum("htj,jhm->thm", score.softmax(-1)[..., : start + length], v)

"""Attention of a step's tasks over the pages of the cache, by one kernel that takes task after task, and one that merges.

    out[t, h] = sum_j p[j] v[j],   p = softmax over the keys j that t sees of (scale * q[t, h] · k[j])

The result of a token whose keys are all in one task is written at once. Of others, partial results are kept and merged in
the order of their splits; with `invariant` a task that walks through several splits does the same in registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import Variant, fused, launch, power_of_two
from .attention_parts import merge_parts
from .attention_tasks import SPLIT
from .attention_walk import FOREVER, attend


@dataclass(frozen=True, slots=True)
class TaskIndex:
    """The tasks of a step on the device, for all layers with one window: what `plan_tasks` found of T tokens, padded to N."""

    tokens: int  # T, or more
    window: int | None
    count: Tensor  # int32 [1], how many of the records are to be done
    records: Tensor  # int32 [capacity, 6]
    part: Tensor  # int32 [N + 1]; -1 behind the tokens
    positions: Tensor  # int [N]
    table: Tensor  # int32 [slots, columns]
    rows: int  # of a tile
    invariant: bool
    programs: int | None  # how many take turns, whatever the count; None: one for each piece of work
    partial: Tensor  # fp32 [parts, H, m], weighted sums of values; none where no token has several parts
    state: Tensor  # fp32 [parts, H, 2], largest scores and sums of weights
    split: int = SPLIT


def workspace(parts: int, heads: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for partial results of values of `size` components: `partial` and `state` of a TaskIndex."""
    return tuple(torch.empty(parts, heads, width, dtype=torch.float32, device=device) for width in (size, 2))  # type: ignore[return-value]


def fixed_programs(device: torch.device) -> int:
    """A number of programs that keeps a device busy, whatever there is to do."""
    if device.type != "cuda":
        return 4
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


def attend_tasks(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: TaskIndex,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention as `paged_attention` describes it, which calls this after it checked what is given. Returns [N, H * m].

    q: [N, H, n] whose components lie together. Raises ValueError for other strides, for an index that has other sizes,
    and where no kernels run.
    """
    n, heads, size = q.shape
    kv_heads, block_size, value_size = v_cache.shape[1:]
    if not fused(q):
        raise ValueError(f"tasks are done by a Triton kernel: they need a CUDA device with Triton, not {q.device}")
    if len(index.part) != n + 1 or len(index.positions) != n or index.partial.shape[1:] != (heads, value_size):
        raise ValueError(
            f"queries {list(q.shape)} do not go with the parts of {len(index.part) - 1} tokens, {len(index.positions)} "
            f"positions and partial results {list(index.partial.shape)}"
        )
    if not (q.stride(2) == 1 and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("the components of queries, and a layer's keys and values, must lie together")
    out = torch.empty(n, heads, value_size, dtype=q.dtype, device=q.device)
    sizes = heads // kv_heads, size, value_size, block_size, index.split
    tile = _tile(q.dtype, index.rows, *sizes, invariant=index.invariant, tall=_tall(q.device))
    sinks = None if sinks is None else sinks.float().contiguous()
    flags = {"HAS_CAP": softcap is not None, "HAS_SINKS": sinks is not None, "INVARIANT": index.invariant}
    log2_e = math.log2(math.e)
    rate, cap = (scale * log2_e, 0.0) if softcap is None else (2 * log2_e * scale / softcap, log2_e * softcap)
    programs = index.programs or len(index.records) * kv_heads * tile.constants["PIECES"]
    held = index.records, index.count, index.part, index.positions, index.table
    numbers = kv_heads, q.stride(0), q.stride(1), index.table.stride(0), index.window or FOREVER, rate, cap
    args = (q, k_cache, v_cache, sinks, *held, out, index.partial, index.state, *numbers)
    launch(attend, (programs,), *args, warps=tile.warps, registers=tile.registers, **flags, **tile.constants)
    if len(index.partial):
        merge_parts(index.partial, index.state, index.part, sinks, out)
    else:
        out[index.tokens :] = 0
    return out.view(n, -1)


class _Tile(NamedTuple):
    """Sizes of the kernel, and what a program of it takes."""

    constants: dict[str, int]
    warps: int
    registers: int | None


def _tall(device: torch.device) -> bool:
    """Whether tensor cores read both operands from shared memory, which leaves registers for 128 rows."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tile(
    dtype: torch.dtype,
    rows: int,
    group: int,
    size: int,
    value_size: int,
    block_size: int,
    split: int,
    *,
    invariant: bool,
    tall: bool = False,
) -> _Tile:
    """The largest of which nothing spills. Of a task with more rows a program does a piece."""
    depth, width = power_of_two(size, 16), power_of_two(value_size, 16)
    wide = max(depth, width) > 128
    if dtype == torch.float32:
        height, keys = 16, 16 if invariant else 32
    elif wide:
        height, keys = 32 if invariant else 64, 32
    else:
        height, keys = (128 if tall else 64) // (2 if invariant else 1), 64
    height = max(min(rows, height), power_of_two(group))
    warps = 8 if wide or height > 32 else 4
    constants = {
        "GROUP": group,
        "ROWS": height,
        "PIECES": -(-(rows // group) // (height // group)),
        "KEYS": min(keys, split),
        "SPLIT": split,
        "BLOCK_SIZE": block_size,
        "VECTOR": min(block_size & -block_size, 16),
        "SIZE": size,
        "DEPTH": depth,
        "VALUE_SIZE": value_size,
        "WIDTH": width,
    }
    return _Tile(constants, warps, None)


def variants() -> Iterator[Variant]:
    """Pages of 16 tokens; other pages change the width of loads, other groups nothing but numbers."""
    decode, small, common, large = (4, 128, 32), (8, 64, 128), (4, 128, 128), (8, 256, 128)  # group, size, rows
    for invariant in (False, True):
        for shape in (decode, small, common, large):
            yield _variant(torch.bfloat16, *shape, invariant=invariant)
        for shape in (decode, common):
            yield _variant(torch.float16, *shape, invariant=invariant)
        for shape in (small, common, large):
            yield _variant(torch.float32, *shape, invariant=invariant)
        for dtype in (torch.bfloat16, torch.float32):
            yield _variant(dtype, *large, invariant=invariant, HAS_CAP=True)
            yield _variant(dtype, *small, invariant=invariant, HAS_SINKS=True)
        for dtype, shape in ((torch.bfloat16, small), (torch.bfloat16, common), (torch.float16, common)):
            yield _variant(dtype, *shape, invariant=invariant, tall=True)


def _variant(
    dtype: torch.dtype, group: int, size: int, rows: int, *, invariant: bool = False, tall: bool = False, **flags: bool
) -> Variant:
    name = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = {**dict.fromkeys(("q", "k_cache", "v_cache"), name), "sinks": "*fp32"}
    types |= {**dict.fromkeys(("records", "count", "part", "positions", "table"), "*i32"), "out": name}
    types |= {"partial": "*fp32", "state": "*fp32"}
    types |= dict.fromkeys(("kv_heads", "q_stride", "q_head_stride", "columns", "window"), "i32")
    types |= {"rate": "fp32", "cap": "fp32"}
    tile = _tile(dtype, rows, group, size, size, 16, SPLIT, invariant=invariant, tall=tall)
    constants = {"HAS_CAP": False, "HAS_SINKS": False, **flags, "INVARIANT": invariant, **tile.constants}
    return Variant(attend, types, constants, tile.warps, tile.registers, least=90 if tall else 80)

"""How long does attention over the pages of a cache take on a GPU?

32 query heads share 8 KV heads of 128 components in bf16; blocks have 16 tokens and lie in no order. "decode": sequences
with one new token each. "prefill": a prompt at once. "group": sequences that share all but their last 32 tokens, read
once ("shared=1") or by each ("shared=0"). The floor is what it takes to read the keys and values of all, those that are
shared once: a prompt is bound by its products instead, of which the table tells nothing. The peers have their keys and
values side by side (torch) or in pages (FlashInfer).

    python benchmarks/kernels/attention.py [--seconds 600 --output benchmarks/results]
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from common import Call, Device, Shape, Work, main

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
OWN = 32  # tokens that a sequence of a group has of its own
CASES: tuple[Shape, ...] = (
    {"kind": "decode", "rows": 64, "context": 2048},
    {"kind": "prefill", "rows": 1, "context": 4096},
    {"kind": "group", "rows": 8, "context": 4096, "shared": 1},
    {"kind": "group", "rows": 8, "context": 4096, "shared": 0},
    {"kind": "decode", "rows": 8, "context": 2048},
    {"kind": "decode", "rows": 256, "context": 1024},
    {"kind": "decode", "rows": 1, "context": 32768},
    {"kind": "prefill", "rows": 4, "context": 1024},
)


def prepare(shape: Shape, device: Device) -> Work:
    from pagefork.kernels.attention_tasks import plan_tasks
    from pagefork.kernels.paged_attention import paged_attention
    from pagefork.kernels.task_attention import TaskIndex, workspace

    kind, rows, context = str(shape["kind"]), int(shape["rows"]), int(shape["context"])
    columns, shared = context // BLOCK, (context - OWN) // BLOCK if kind == "group" else 0
    length = np.full(rows, context if kind == "prefill" else 1, np.int32)
    start = (context - length).astype(np.int32)
    trunk = np.array([[0, rows, shared]] if shape.get("shared") else [], np.int32).reshape(-1, 3)
    slot = np.arange(rows, dtype=np.int32)
    tasks = plan_tasks(slot, start, length, trunk, group=HEADS // KV_HEADS, block_size=BLOCK)
    blocks = rows * columns
    table = torch.randperm(blocks).view(rows, columns)
    table[:, :shared] = table[0, :shared]
    tokens = int(length.sum())
    positions = np.concatenate([np.arange(x, x + n) for x, n in zip(start, length, strict=True)])
    partial_sums, state = workspace(int(tasks.part[-1]), HEADS, SIZE, device.name)

    def sent(values: np.ndarray[Any, Any] | Tensor) -> Tensor:
        return torch.as_tensor(values).to(device.name, torch.int32)

    index = TaskIndex(
        tokens=tokens,
        window=None,
        count=sent(np.array([len(tasks.records)])),
        records=sent(tasks.records),
        part=sent(tasks.part),
        positions=sent(positions),
        table=sent(table),
        rows=tasks.rows,
        invariant=False,
        programs=None,
        partial=partial_sums,
        state=state,
    )
    read = (shared + rows * (columns - shared)) * BLOCK * KV_HEADS * SIZE * 2 * 2
    calls: list[Call] = []
    peers: dict[str, list[Call]] = {"torch": []}
    for _ in range(device.copies(read)):
        q = torch.randn(tokens, HEADS, SIZE, dtype=torch.bfloat16, device=device.name)
        k = torch.randn(blocks, KV_HEADS, SIZE, BLOCK, dtype=torch.bfloat16, device=device.name)
        v = torch.randn(blocks, KV_HEADS, BLOCK, SIZE, dtype=torch.bfloat16, device=device.name)
        calls.append(partial(paged_attention, q, k, v, index, SIZE**-0.5))
        peers["torch"].append(side_by_side(q, k, v, table.to(device.name), causal=kind == "prefill"))
        if kind != "prefill" and (call := by_flashinfer(q, k, v, table, device)):
            peers.setdefault("flashinfer", []).append(call)
    return Work(calls, read + 2 * tokens * HEADS * SIZE * 2, peers)


def side_by_side(q: Tensor, k: Tensor, v: Tensor, table: Tensor, causal: bool) -> Call:
    """torch's attention of keys and values that were gathered before."""
    rows = len(table)
    keys = k[table].permute(0, 2, 1, 4, 3).flatten(2, 3).contiguous()
    values = v[table].transpose(1, 2).flatten(2, 3).contiguous()
    queries = q.view(rows, -1, HEADS, SIZE).transpose(1, 2)
    attention = functional.scaled_dot_product_attention
    return partial(attention, queries, keys, values, is_causal=causal, enable_gqa=True)


def by_flashinfer(q: Tensor, k: Tensor, v: Tensor, table: Tensor, device: Device) -> Call | None:
    """FlashInfer's decoding over the same pages, whose keys it wants token by token; None where it is not there or can't."""
    try:
        call = flashinfer_call(q, k, v, table, device)
        call()
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001  # it compiles on its own account, which fails in many ways
        print(f"flashinfer is left out: {type(error).__name__}: {error}"[:300])
        return None
    return call


def flashinfer_call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, device: Device) -> Call:
    flashinfer = import_module("flashinfer")
    rows, columns = table.shape
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device.name)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    begin = torch.arange(rows + 1, dtype=torch.int32) * columns
    last = torch.full((rows,), BLOCK, dtype=torch.int32)
    blocks = table.flatten().int().to(device.name)
    wrapper.plan(begin, blocks, last, HEADS, KV_HEADS, SIZE, BLOCK, q_data_type=q.dtype, kv_data_type=q.dtype)
    return partial(wrapper.run, q, (k.transpose(2, 3).contiguous(), v))


if __name__ == "__main__":
    main("attention", __doc__ or "", CASES, prepare)

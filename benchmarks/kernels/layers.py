"""How long do the parts of a layer that are not attention take on a GPU: norm, gate, rotation and writes to the cache, product?

`rms_norm` adds the residual first; `rope_write` normalises queries and keys as well, and writes keys and values. The peers
are torch's own functions, one by one; of the product whose rows never change bits it is torch's linear layer, which reads
the same bytes. Its floor is of memory alone: beyond some hundred rows arithmetic takes longer.

    python benchmarks/kernels/layers.py [--seconds 600 --output benchmarks/results]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from common import Device, Shape, Work, main
from inputs import grid

HALF = torch.bfloat16
HEADS, KV_HEADS, SIZE, BLOCK = 16, 8, 128, 16
EPS = 1e-6


def prepare(shape: Shape, device: Device) -> Work:
    return PARTS[str(shape["part"])](shape, device)


def norm(shape: Shape, device: Device) -> Work:
    from pagefork.kernels.rms_norm import reference, rms_norm

    tokens, width = int(shape["tokens"]), int(shape["width"])
    weight = torch.ones(width, dtype=HALF, device=device.name)
    size = 4 * tokens * width * HALF.itemsize  # x and the residual in, the sum and the result out
    pairs = [(random(device, tokens, width), random(device, tokens, width)) for _ in range(device.copies(size))]
    calls = [partial(rms_norm, x, weight, EPS, residual) for x, residual in pairs]
    return Work(calls, size, {"torch": [partial(reference, x, weight, EPS, residual) for x, residual in pairs]})


def gate(shape: Shape, device: Device) -> Work:
    from pagefork.kernels.silu_mul import reference, silu_mul

    tokens, width = int(shape["tokens"]), int(shape["width"])
    size = 3 * tokens * width * HALF.itemsize
    given = [random(device, tokens, 2 * width) for _ in range(device.copies(size))]
    return Work([partial(silu_mul, x) for x in given], size, {"torch": [partial(reference, x) for x in given]})


def rotation(shape: Shape, device: Device) -> Work:
    from pagefork.kernels.rope import rope_tables
    from pagefork.kernels.rope_write import rope_write

    tokens = int(shape["tokens"])
    size = 2 * tokens * (HEADS + 2 * KV_HEADS) * SIZE * HALF.itemsize
    weight = torch.ones(HEADS + KV_HEADS, SIZE, dtype=HALF, device=device.name)
    frequencies = 1e6 ** -torch.linspace(0, 1, SIZE // 2, device=device.name)
    tables = rope_tables(torch.arange(tokens, device=device.name), frequencies, 1.0, HALF)
    blocks = -(-tokens // BLOCK) + 1
    place = torch.arange(tokens, device=device.name)
    if shape["rows"] == "decode":  # every token goes to a block of its own
        blocks = tokens + 1
        place *= BLOCK
    where = (place // BLOCK + 1).int(), (place % BLOCK).int()
    calls, peers = [], []
    for _ in range(device.copies(size)):
        qkv = random(device, tokens, HEADS + 2 * KV_HEADS, SIZE)
        k_cache = torch.zeros(blocks, KV_HEADS, SIZE, BLOCK, dtype=HALF, device=device.name)
        v_cache = torch.zeros(blocks, KV_HEADS, BLOCK, SIZE, dtype=HALF, device=device.name)
        calls.append(partial(rope_write, qkv, weight, EPS, *tables, k_cache, v_cache, *where))
        peers.append(partial(one_by_one, qkv, weight, *tables, k_cache, v_cache, *where))
    return Work(calls, size, {"torch": peers})


def one_by_one(
    qkv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, offsets: Tensor
) -> Tensor:
    qk, v = qkv[:, : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
    qk = functional.rms_norm(qk, (SIZE,), None, EPS) * weight
    qk = torch.addcmul(qk * cos, qk.roll(SIZE // 2, -1), sin)
    k_cache.permute(0, 3, 1, 2)[blocks, offsets] = qk[:, HEADS:]
    v_cache.transpose(1, 2)[blocks, offsets] = v
    return qk[:, :HEADS].contiguous()


def product(shape: Shape, device: Device) -> Work:
    from pagefork.kernels.matmul import matmul

    tokens, width, out = int(shape["tokens"]), int(shape["width"]), int(shape["out"])
    size = (tokens * (width + out) + width * out) * HALF.itemsize
    pairs = [(random(device, tokens, width), random(device, out, width)) for _ in range(device.copies(size))]
    calls = [partial(matmul, x, weight) for x, weight in pairs]
    return Work(calls, size, {"torch": [partial(functional.linear, x, weight) for x, weight in pairs]})


def random(device: Device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=HALF, device=device.name)


PARTS: dict[str, Callable[[Shape, Device], Work]] = {
    "rms_norm": norm,
    "silu_mul": gate,
    "rope_write": rotation,
    "matmul": product,
}

if __name__ == "__main__":
    shapes = [
        *grid(part=["rms_norm"], width=[1024, 4096], tokens=[1, 64, 4096]),
        *grid(part=["silu_mul"], width=[3072, 14336], tokens=[1, 64, 4096]),
        *grid(part=["rope_write"], rows=["decode"], tokens=[1, 64, 256]),
        *grid(part=["rope_write"], rows=["prompt"], tokens=[4096]),
        *grid(part=["matmul"], width=[1024], out=[6144], tokens=[1, 64, 4096]),
        *grid(part=["matmul"], width=[4096], out=[4096], tokens=[1, 64, 4096]),
    ]
    main("layers", __doc__ or "", shapes, prepare)

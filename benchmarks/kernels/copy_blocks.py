"""How long does it take on a GPU to copy blocks of a KV cache in all layers, as forks need it before they write?

A block has 16 tokens of 8 KV heads of 128 components in bf16. The peer indexes in torch.

    python benchmarks/kernels/copy_blocks.py [--seconds 600 --output benchmarks/results]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import Device, Shape, Work, main
from inputs import grid

BLOCK = (8, 16, 128)


def prepare(shape: Shape, device: Device) -> Work:
    from pagefork.kernels.kv_cache import copy_blocks

    layers, count = int(shape["layers"]), int(shape["blocks"])
    cache = torch.zeros(layers, max(2 * count, 64), *BLOCK, dtype=torch.bfloat16, device=device.name)
    size = 2 * count * cache[:, 0].nbytes
    calls, peers = [], []
    for _ in range(device.copies(size)):
        src, dst = torch.randperm(cache.shape[1], device=device.name)[: 2 * count].chunk(2)
        calls.append(partial(copy_blocks, cache, src, dst))
        peers.append(partial(indexed, cache, src, dst))
    return Work(calls, size, {"torch": peers})


def indexed(cache: Tensor, src: Tensor, dst: Tensor) -> None:
    cache[:, dst] = cache[:, src]


if __name__ == "__main__":
    main("copy_blocks", __doc__ or "", grid(layers=[32, 16], blocks=[1, 4, 16, 64, 256]), prepare)

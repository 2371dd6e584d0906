"""How long does it take on a GPU to compare states with all earlier ones of their sequences, read off pages?

Every search has k candidates that share all blocks but the last one. The peer gathers the states of each search once
and multiplies them in torch.

    python benchmarks/kernels/similarity.py [--seconds 600 --output benchmarks/results]
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

SIZE = 16  # places of a block


def prepare(shape: Shape, device: Device) -> Work:
    from pagefork.kernels.similarity_tiles import best_cosines, plan

    searches, k, length, width = (int(shape[name]) for name in ("searches", "k", "length", "D"))
    columns = length // SIZE
    blocks = searches * (columns + k)
    table = torch.arange(searches * columns).view(searches, 1, columns).repeat(1, k, 1)
    table[:, :, -1] = searches * columns + torch.arange(searches * k).view(searches, k)  # the last block is its own
    tables = table.view(-1, columns)
    end = torch.full((searches * k,), length)
    size = (searches * (columns - 1) + searches * k) * SIZE * width * 2
    given = []
    for _ in range(device.copies(size)):
        pages = torch.randn(blocks, SIZE, width, dtype=torch.bfloat16, device=device.name) / width**0.5
        states = torch.randn(searches * k, width, dtype=torch.bfloat16, device=device.name)
        tiles = plan(tables.numpy(), torch.zeros_like(end).numpy(), end.numpy(), SIZE, device.name)
        given.append((states, pages, tiles))
    calls = [partial(best_cosines, *args) for args in given]
    index = table.to(device.name)
    peers = [partial(gathered, states, pages, index) for states, pages, _ in given]
    return Work(calls, size, {"torch": peers})


def gathered(states: Tensor, pages: Tensor, table: Tensor) -> Tensor:
    """fp32 [searches, k]: the shared blocks multiplied for all candidates at once, the last one for each."""
    searches, k, _ = table.shape
    queries = torch.nn.functional.normalize(states.float(), dim=-1).to(pages.dtype).view(searches, k, -1)
    shared = pages[table[:, 0, :-1]].flatten(1, 2)
    own = pages[table[:, :, -1]]
    best = (queries @ shared.transpose(1, 2)).amax(-1)
    return torch.maximum(best, (own @ queries[..., None])[..., 0].amax(-1)).clamp_(max=1.0)


if __name__ == "__main__":
    shapes = grid(D=[4096, 2048], k=[5], length=[2048, 512, 8192], searches=[1, 8, 64])
    main("similarity", __doc__ or "", shapes, prepare)

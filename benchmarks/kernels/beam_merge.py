"""How long does a step of beam search take to find the best 2K (beam, token) pairs of each of its searches on a GPU?

G searches of width K: G K rows of logits, from which each search takes its 2K best pairs by score plus log-prob.
Beside it stand log_softmax and one topk per search over all its rows, in torch.

    python benchmarks/kernels/beam_merge.py [--seconds 600 --output benchmarks/results]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import Device, Shape, Work, main
from inputs import VOCABS, entries, rows

SEARCHES = ((8, 4), (64, 4), (1, 4), (64, 8), (16, 32), (1, 256), (1, 512))
SHAPES = [{"G": searches, "K": width, "V": vocab} for vocab in VOCABS for searches, width in SEARCHES]


def prepare(shape: Shape, device: Device) -> Work:
    searches, width, vocab = int(shape["G"]), int(shape["K"]), int(shape["V"])
    count = searches * width
    size = 2 * count * vocab
    logits = [rows("peaked", count, vocab, seed, device.name) for seed in range(device.copies(size))]
    given, score = entries(count, device.name), -10 * torch.rand(count, device=device.name)
    ours = [partial(merge, x, given, score, list(range(0, count + 1, width))) for x in logits]
    return Work(ours, size, {"torch log_softmax, topk": [partial(torch_merge, x, score, width) for x in logits]})


def merge(logits: Tensor, given: Tensor, score: Tensor, offsets: list[int]) -> object:
    """The kernels as a step of the engine launches them."""
    from pagefork.kernels.group_stats import group_stats
    from pagefork.kernels.merge_rows import merge_rows

    stats = group_stats(logits, given, False)
    return merge_rows(logits, given, stats, None, score, offsets, 2 * (offsets[1] - offsets[0]), processed=False)


def torch_merge(logits: Tensor, score: Tensor, width: int) -> object:
    totals = logits.float().log_softmax(-1).add_(score[:, None])
    return totals.view(-1, width * logits.shape[1]).topk(2 * width)


if __name__ == "__main__":
    main("beam_merge", __doc__ or "", SHAPES, prepare)

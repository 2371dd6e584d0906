"""How long do the 20 most probable tokens and their log-probs take on a GPU, with the rank of a given token?

Beside it stands log_softmax with topk, and a comparison with the token's value for the rank, in torch.

    python benchmarks/kernels/top_logprobs.py [--seconds 600 --output benchmarks/results]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import Device, Shape, Work, main
from inputs import BATCHES, VOCABS, entries, grid, rows

BEST = 20


def prepare(shape: Shape, device: Device) -> Work:
    batch, vocab, ranked = int(shape["B"]), int(shape["V"]), shape["case"] == "top 20, rank"
    size = 2 * batch * vocab
    logits = [rows("peaked", batch, vocab, seed, device.name) for seed in range(device.copies(size))]
    given = entries(batch, device.name)
    token = torch.randint(vocab, (batch, 1), device=device.name)
    ours = [partial(read, x, given, token if ranked else None) for x in logits]
    peers = {"torch log_softmax, topk": [partial(torch_read, x, token if ranked else None) for x in logits]}
    return Work(ours, size, peers)


def read(logits: Tensor, given: Tensor, token: Tensor | None) -> object:
    """The kernels as a step of the engine launches them."""
    from pagefork.kernels.best_tokens import best_tokens
    from pagefork.kernels.group_stats import group_stats
    from pagefork.kernels.scales import model_scale
    from pagefork.kernels.token_rank import token_ranks

    stats = group_stats(logits, given, False)
    scale = model_scale(stats)
    ids, values = best_tokens(logits, given, stats, None, BEST)
    rank = None if token is None else token_ranks(logits, given, stats, None, token)
    return ids, scale.log_probs(values), rank


def torch_read(logits: Tensor, token: Tensor | None) -> object:
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(BEST)
    return best, None if token is None else (logprobs > logprobs.gather(-1, token)).sum(-1) + 1


if __name__ == "__main__":
    main("top_logprobs", __doc__ or "", grid(V=VOCABS, case=["top 20", "top 20, rank"], B=BATCHES), prepare)

"""Contrastive search in plain Python on the oracle's model, which knows no blocks, sequences or batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pagefork.scheduler.plan import Spec
from pagefork.scheduler.search_params import ContrastiveSearchParams
from support.oracle import scores, similarity


class Chosen(NamedTuple):
    """One token of the reference, and what it was chosen from."""

    token: int
    logp: float
    ids: list[int]
    p: list[float]
    sim: list[float]
    score: list[float]
    alpha: float


def reference(
    prompt: list[int], spec: Spec, params: ContrastiveSearchParams, stops: frozenset[int] = frozenset()
) -> list[Chosen]:
    """What contrastive search must choose, token by token, up to and including a stop token."""
    tokens, chosen = list(prompt), []
    entropies: list[list[float]] = [[], []]
    for _ in range(params.max_tokens or 1):
        values = scores(tokens, spec)
        ids = sorted(range(len(values)), key=lambda token: (-values[token], token))[: params.top_k]
        alpha = params.alpha
        p = [float(np.exp(np.float32(values[token]))) for token in ids]
        if params.adaptive:
            share = 1 / (1 + math.exp(-shift(p, entropies[0])))
            ids = ids[: max(1, math.floor(params.top_k / 3 + params.top_k * 2 / 3 * share + 0.5))]
            p = p[: len(ids)]
            alpha = 1 / (1 + math.exp(-math.log(alpha / (1 - alpha)) - shift(p, entropies[1])))
        sim = [similarity([*tokens, token], params.window or 0) for token in ids]
        score = [(1 - alpha) * chance - alpha * like for chance, like in zip(p, sim, strict=True)]
        best = max(range(len(ids)), key=lambda i: (score[i], p[i], -i))
        chosen.append(Chosen(ids[best], float(np.float32(values[ids[best]])), ids, p, sim, score, alpha))
        tokens.append(ids[best])
        if ids[best] in stops:
            break
    return chosen


def shift(p: list[float], earlier: list[float]) -> float:
    """q * artanh of how much more uncertain p is than the median of earlier ones, which it joins."""
    total = sum(p)
    entropy = -sum(x / total * math.log(x / total) for x in p) / math.log(len(p)) if len(p) > 1 else 0.0
    difference = entropy - float(np.median(earlier)) if earlier else 0.0
    earlier.append(entropy)
    return 8 * math.atanh(difference)

"""Proof, on loading, that a model computes over the paged cache what it computes by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pagefork.batch import build_batch
from pagefork.cache import KVCache
from pagefork.scheduler.errors import ModelError
from pagefork.scheduler.plan import Rows, ints

if TYPE_CHECKING:
    from .registry import Model

Expected = list[tuple[list[int], Tensor]]  # tokens and their logits [tokens, vocabulary]

_BLOCK = 4
_SHORT, _LONG = 12, 72  # tokens of the longer sequence; the second where that outgrows a window
# How far logits may be off, and for how many of the tokens: rounding may send a few to other experts. With 48 layers of
# random weights bfloat16 was off by up to 0.054, float16 by 0.0065 and float32 by less than 0.0001.
_TOLERANCE = {torch.float32: (1e-3, 1.0), torch.float16: (0.03, 0.75), torch.bfloat16: (0.15, 0.75)}


def reference_logits(model: Any, vocab_size: int, max_len: int, window: int | None) -> Expected:
    """What the model gives for two sequences, each as a whole."""
    longest = min(max_len, _SHORT if window is None or window + 8 > _LONG else max(_SHORT, window + 8))
    random = np.random.default_rng(0)
    expected = []
    for length in (longest, min(longest, 7)):
        tokens = random.integers(0, vocab_size, length).tolist()
        logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]
        expected.append((tokens, logits.float()))
    return expected


def check_logits(model: Model, expected: Expected) -> None:
    """Computes the sequences in chunks, side by side. Raises ModelError unless their logits are as expected."""
    config = model.config
    columns = -(-max(len(tokens) for tokens, _ in expected) // _BLOCK)
    cache = KVCache(config, 2 * columns + 1, _BLOCK, model.dtype, model.device)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    tables = np.random.default_rng(0).permutation(2 * columns).reshape(2, columns).astype(np.int32) + 1
    done = [0, 0]
    found: list[list[Tensor]] = [[], []]
    for shares in ((5, 0), (2, 3), (1, 1), (len(expected[0][0]), len(expected[1][0]))):
        rows = [(slot, done[slot], expected[slot][0][done[slot] :][: shares[slot]]) for slot in (1, 0)]
        rows = [row for row in rows if row[2]]
        if not rows:
            break
        for (slot, _, tokens), logits in zip(rows, _feed(model, cache, tables, rows), strict=True):
            found[slot].append(logits)
            done[slot] += len(tokens)
    errors = torch.cat([_errors(torch.cat(parts), logits) for parts, (_, logits) in zip(found, expected, strict=True)])
    tolerance, share = _TOLERANCE[model.dtype]
    if not (errors <= tolerance).float().mean() >= share:
        raise ModelError(f"its logits are not those that it has with its own attention (off by up to {errors.max():.1%})")


def _feed(model: Model, cache: KVCache, tables: np.ndarray[Any, Any], rows: list[tuple[int, int, list[int]]]) -> list[Tensor]:
    slots, starts, tokens = zip(*rows, strict=True)
    flat = ints([token for row in tokens for token in row])
    lengths = [len(row) for row in tokens]
    plan = Rows(ints(slots), ints(starts), ints(np.cumsum([0, *lengths])), flat, np.empty((0, 3), np.int32))
    batch = build_batch(plan, tables, model.config, cache)
    hidden = model.forward(batch, cache)
    return list(model.logits(hidden[: len(flat)]).split(lengths))


def _errors(found: Tensor, expected: Tensor) -> Tensor:
    """How far each token's logits are off, [tokens]; what all logits of a token share counts for nothing."""
    found, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (found, expected))
    difference, size = (torch.linalg.vector_norm(x, dim=-1) for x in (found - expected, expected))
    errors: Tensor = difference / size.clamp_min(1e-6)
    return errors

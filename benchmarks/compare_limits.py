"""What the machine allows: how fast it reads memory and multiplies in bfloat16, and the least time of a load from that.

A step of decoding reads every weight and the cached keys and values once, and multiplies them with all rows; it takes
at least the longer of the two times, at the measured rates. With h hidden units, L layers, H heads of d, G of them for
keys and values, i units between and a vocabulary of v, for n rows at context c:

    weights = L (2 h H d + 2 h G d + 3 h i) + v h
    bytes   = weights x bytes of a weight + 4 L G d x tokens in the cache (bfloat16)
    flops   = n (2 weights + 4 L H d c)
    step    = max(bytes / read rate, flops / product rate)

The prompts are one such step of all their tokens, with the last layer for the last of each. Beams of a prompt share
its cached tokens; those they have apart are not counted. The limit is prompts x output tokens / (prompts + steps).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peers.protocol import Load

READ = 512 << 20  # bytes
SHAPES = ((64, 576, 1536), (512, 576, 3072), (512, 2048, 2048), (2048, 2048, 2048), (2048, 4096, 4096))
TIMES = 12


class Rates(NamedTuple):
    """Bytes read and floating-point operations per second, with all threads."""

    read: float
    product: float


class Outline(NamedTuple):
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    between: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.groups)
        return self.layers * (attention + 3 * self.hidden * self.between)

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def token_bytes(self) -> int:
        """Of its keys and values."""
        return 4 * self.layers * self.groups * self.head_dim

    def attention_flops(self, context: float) -> float:
        """Of one token that looks at so many."""
        return 4 * self.layers * self.heads * self.head_dim * context


def outline(model: Path) -> Outline:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = json.loads((model / "config.json").read_text())
    return Outline(*(config[name] for name in (*names, "intermediate_size", "vocab_size")))


def least_seconds(load: Load, model: Outline, rates: Rates, weight_bytes: float = 2) -> float:
    """No engine is faster that computes in bfloat16."""

    def step(tokens: int, heads: int, context: float, cached: int) -> float:
        weights = weight_bytes * (model.layer_weights + model.head_weights)
        flops = tokens * (2 * model.layer_weights + model.attention_flops(context)) + heads * 2 * model.head_weights
        return max((weights + cached * model.token_bytes) / rates.read, flops / rates.product)

    seconds = step(load.prompts * load.input, load.prompts, (load.input + 1) / 2, 0)
    rows = load.prompts * (load.beam or 1)
    for context in range(load.input + 1, load.input + load.output):
        seconds += step(rows, rows, context, load.prompts * context)
    return seconds


def measure_rates() -> Rates:
    """The best of several: a reduction over a buffer much larger than the caches, products of several shapes."""
    buffer = torch.ones(READ // 4)
    read = max(READ / _least(buffer.amax), READ / _least(buffer.sum))
    product = 0.0
    for rows, columns, outputs in SHAPES:
        x, weight = torch.randn(rows, columns).bfloat16(), torch.randn(outputs, columns).bfloat16()
        seconds = _least(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
        product = max(product, 2 * rows * columns * outputs / seconds)
    return Rates(read, product)


def _least(call: Callable[[], object]) -> float:
    times = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)

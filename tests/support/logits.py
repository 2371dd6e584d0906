"""The logits pipeline by the book, one row at a time in numpy, sums in float64: what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = NDArray[Any]


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> list[int]:
    """Philox4x32 as its authors define it, on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniform(seed: int, stream: int, position: int) -> float:
    """53 bits in [0, 1)."""
    low = 0xFFFFFFFF
    words = philox4x32([position, stream & low, (stream >> 32) & low, 0], [seed & low, (seed >> 32) & low])
    return ((words[0] << 32 | words[1]) >> 11) / 2**53


def banned(history: Sequence[int], vocab: int, generated: int, spec: dict[str, Any]) -> set[int]:
    """Token ids that may not come next."""
    out = set(spec.get("end_ids", ())) if generated < spec.get("min_tokens", 0) else set()
    if spec.get("allowed_ids") is not None:
        out |= set(range(vocab)) - set(spec["allowed_ids"])
    for word in spec.get("bad_words", ()):
        if len(word) == 1 or tuple(history[-(len(word) - 1) :]) == tuple(word[:-1]):
            out.add(word[-1])
    n = spec.get("no_repeat_ngram_size", 0)
    if n:
        tail = list(history[len(history) - n + 1 :]) if len(history) >= n - 1 else None
        out |= {history[i + n - 1] for i in range(len(history) - n + 1) if list(history[i : i + n - 1]) == tail}
    return out


def adjusted(logits: Row, history: Sequence[int], prompt_len: int, spec: dict[str, Any]) -> Row:
    """Bans, bias and penalties on one row; rounded to fp32 after every stage, as the pipeline is defined."""
    x = logits.astype(np.float32)
    x[list(banned(history, len(x), len(history) - prompt_len, spec))] = -np.inf
    for token, bias in spec.get("logit_bias", ()):
        x[token] += np.float32(bias)
    repetition = np.float32(spec.get("repetition_penalty", 1.0))
    for token in set(history) if repetition != 1 else ():
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    frequency, presence = np.float32(spec.get("frequency_penalty", 0.0)), np.float32(spec.get("presence_penalty", 0.0))
    output = list(history[prompt_len:])
    for token in set(output):
        x[token] -= frequency * np.float32(output.count(token)) + presence
    return x


class Kept(NamedTuple):
    mask: NDArray[np.bool_]
    probs: Row  # renormalised, float64
    margin: float  # how far, in mass, the closest decision about the set was from going the other way


def kept(x: Row, spec: dict[str, Any]) -> Kept:
    """What temperature, top-k, top-p and min-p leave of one row; thresholds on the value, so ties stay."""
    temperature = spec.get("temperature", 1.0)
    x = x.astype(np.float64)
    weight = np.exp((x - x.max()) / (np.float64(np.float32(temperature)) if temperature >= 1e-5 else 1.0))
    mask, margin = np.isfinite(x), 1.0
    k, p, min_p = spec.get("top_k", 0), spec.get("top_p", 1.0), spec.get("min_p", 0.0)
    if 0 < k < len(x):
        mask &= x >= np.sort(x)[-k]
    if p < 1:
        order = np.argsort(-x[mask], kind="stable")
        values = x[mask][order]
        ends = np.flatnonzero(np.diff(values, append=-np.inf))  # of the runs of ties
        mass = np.cumsum(weight[mask][order])[ends]
        mass /= mass[-1]
        margin = float(np.abs(mass - p).min())
        mask &= x >= values[ends[np.searchsorted(mass, p)]]
    mask &= weight >= min_p
    return Kept(mask, weight * mask / (weight * mask).sum(), margin)


def draw(probs: Row, number: float) -> tuple[int, float]:
    """The first id whose cumulative probability exceeds `number`, and the distance to the nearest boundary of the CDF."""
    cdf = np.cumsum(probs)
    token = min(int(np.searchsorted(cdf, number, side="right")), int(probs.nonzero()[0][-1]))
    return token, float(np.abs(cdf[cdf < 1 - 1e-12] - number).min(initial=1.0))


def log_softmax(x: Row) -> Row:
    x = x.astype(np.float64)
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())

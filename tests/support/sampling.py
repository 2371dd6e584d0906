"""A sampler on its own: slots that are opened, fed and read directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pagefork.pending import Fetch
from pagefork.sampler import Sampler
from pagefork.scheduler.plan import Kind, Opens, Probe, Reads, Rows, Spec, ints

CPU = torch.device("cpu")
VOCAB, SLOTS, MAX_LEN = 97, 40, 600


def opens(slots: list[int], histories: list[list[int]], streams: list[int] | None = None) -> Opens:
    """Slot i opens with spec i and a history."""
    edges = np.cumsum([0, *map(len, histories)])
    stream = np.array(streams or range(len(slots)), np.int64)
    return Opens(
        ints(slots),
        ints(range(len(slots))),
        stream,
        ints(edges[:-1]),
        ints(edges[1:]),
        ints([token for history in histories for token in history]),
    )


def rows(slots: list[int], starts: list[int], tokens: list[list[int]]) -> tuple[Rows, torch.Tensor]:
    flat = [token for row in tokens for token in row]
    offset = ints(np.cumsum([0, *map(len, tokens)]))
    return Rows(ints(slots), ints(starts), offset, ints(flat), ints(np.empty((0, 3)))), torch.tensor(flat, dtype=torch.long)


def probe(kind: Kind, slots: list[int], n: int = 0, processed: bool = False) -> Probe:
    return Probe(kind=kind, at=ints(range(len(slots))), slot=ints(slots), n=n, processed=processed)


def read(
    sampler: Sampler,
    logits: torch.Tensor,
    slots: list[int],
    position: list[int],
    kind: Kind = Kind.SAMPLE,
    n: int = 0,
    processed: bool = False,
) -> Reads:
    return read_probe(sampler, logits, probe(kind, slots, n, processed), position)


def read_probe(
    sampler: Sampler, logits: torch.Tensor, asked: Probe, position: Sequence[int] | NDArray[Any], row: Sequence[int] | None = None
) -> Reads:
    """What the sampler finds; entry i reads row i of the logits where `row` does not say otherwise."""
    rows = np.arange(len(asked.slot)) if row is None else np.array(row)
    return Fetch([sampler.read(logits, asked, rows, np.array(position))], logits.device).reads()[0]


def opened(
    specs: list[Spec],
    histories: list[list[int]],
    streams: list[int] | None = None,
    vocab: int = VOCAB,
    device: torch.device = CPU,
) -> Sampler:
    sampler = Sampler(SLOTS, vocab, MAX_LEN, device)
    sampler.open(opens(list(range(len(specs))), histories, streams), specs)
    return sampler


def random_spec(rng: np.random.Generator, history: list[int], vocab: int = VOCAB) -> dict[str, Any]:
    """A spec in which every feature is on now and then."""

    def sometimes(value: Any, neutral: Any) -> Any:
        return value if rng.random() < 0.3 else neutral

    words = tuple(tuple(rng.integers(0, 6, size).tolist()) for size in (1, 2, 3, 2))
    return {
        "prompt_len": int(rng.integers(1, len(history) + 1)),
        "seed": int(rng.integers(0, 2**63)),
        "temperature": float(rng.choice([0.0, 0.5, 1.0, 1.0, 1.7])),
        "top_k": int(sometimes(rng.choice([1, 3, 20, 96]), 0)),
        "top_p": float(sometimes(rng.choice([0.1, 0.5, 0.9]), 1.0)),
        "min_p": float(sometimes(0.1, 0.0)),
        "repetition_penalty": sometimes(1.4, 1.0),
        "frequency_penalty": sometimes(0.6, 0.0),
        "presence_penalty": sometimes(-0.4, 0.0),
        "no_repeat_ngram_size": sometimes(2, 0),
        "min_tokens": sometimes(4, 0),
        "end_ids": (0, 1),
        "allowed_ids": sometimes(tuple(range(0, vocab, 2)), None),
        "bad_words": sometimes(words, ()),
        "logit_bias": sometimes(((2, 5.0), (3, -1.5)), ()),
        "processed": bool(rng.random() < 0.3),
        "rank": bool(rng.random() < 0.5),
    }


def random_batch(count: int, seed: int, vocab: int = VOCAB) -> tuple[list[dict[str, Any]], list[list[int]], torch.Tensor]:
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, 6, rng.integers(1, 15)).tolist() for _ in range(count)]
    logits = torch.from_numpy((rng.normal(size=(count, vocab)) * 3).astype(np.float32))
    return [random_spec(rng, history, vocab) for history in histories], histories, logits

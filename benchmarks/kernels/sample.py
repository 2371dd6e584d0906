"""How long does a draw take on a GPU: statistics of the logits, penalties, filters, token and log-prob?

The full chain has penalties on 500 tokens of each row, temperature 0.8, top-k 50, top-p 0.95 and min-p 0.05. Beside it
stand the same by sorting in torch, by the logits processors of transformers, and by FlashInfer where it is installed
(without penalties and min-p).

    python benchmarks/kernels/sample.py [--seconds 600 --output benchmarks/results]
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import Device, Shape, Work, main
from inputs import BATCHES, VOCABS, entries, grid, rows

TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 50, 0.95, 0.05
REPETITION, FREQUENCY, PRESENCE = 1.1, 0.2, 0.1
SEEN = 500  # tokens that penalties concern
CASES = {
    "full peaked": ("full", "peaked"),
    "greedy": ("greedy", "peaked"),
    "unfiltered": ("unfiltered", "peaked"),
    "top-p peaked": ("top-p", "peaked"),
    "top-p flat": ("top-p", "flat"),
    "full flat": ("full", "flat"),
}


def prepare(shape: Shape, device: Device) -> Work:
    batch, vocab = int(shape["B"]), int(shape["V"])
    mode, kind = CASES[str(shape["case"])]
    size = 2 * batch * vocab
    logits = [rows(kind, batch, vocab, seed, device.name) for seed in range(device.copies(size))]
    seen = torch.stack([torch.randperm(vocab, device=device.name)[:SEEN] for _ in range(batch)])
    chain = own_chain(mode, batch, vocab, seen)
    peers = {name: [partial(run, x) for x in logits] for name, run in others(mode, seen).items()}
    return Work([partial(chain, x) for x in logits], size, peers)


def own_chain(mode: str, batch: int, vocab: int, seen: Tensor) -> Callable[[Tensor], object]:
    """The kernels as a step of the engine launches them; entries and the token table are there before."""
    from pagefork.kernels.adjusted_stats import adjust_stats
    from pagefork.kernels.draw import draw
    from pagefork.kernels.entries import Entry
    from pagefork.kernels.group_stats import group_stats
    from pagefork.kernels.token_table import mark, new_table

    own = Entry.OWN if mode in ("full", "top-p") else Entry(0)
    filters = {"top_k": TOP_K, "top_p": TOP_P, "min_p_depth": TEMPERATURE * math.log(MIN_P)}
    penalties = {"repetition": REPETITION, "frequency": FREQUENCY, "presence": PRESENCE}
    full = {"flags": own | Entry.ADJUSTED | Entry.COUNTED, "temperature": TEMPERATURE, **filters, **penalties}
    fields: dict[str, dict[str, float]] = {
        "greedy": {"flags": Entry.GREEDY},
        "unfiltered": {"flags": 0},
        "top-p": {"flags": own, "temperature": TEMPERATURE, "top_p": TOP_P},
        "full": full,
    }
    given = entries(batch, seen.device, **fields[mode])
    table = None
    if mode == "full":
        table = new_table(batch, 1024, vocab, seen.device)
        slots = torch.arange(batch, dtype=torch.int32, device=seen.device).repeat_interleave(SEEN)
        mark(table, slots, seen.flatten(), torch.ones_like(slots))

    def run(logits: Tensor) -> object:
        stats = group_stats(logits, given, bool(own))
        if table is not None:
            adjust_stats(stats, logits, given, table, most=SEEN)
        return draw(logits, given, stats, table, filtered=mode in ("full", "top-p"))

    return run


def others(mode: str, seen: Tensor) -> dict[str, Callable[[Tensor], object]]:
    """What others offer for the same."""
    if mode == "greedy":
        return {"torch argmax": lambda x: x.argmax(-1)}
    if mode == "unfiltered":
        return {"torch multinomial": lambda x: x.float().softmax(-1).multinomial(1)}
    found: dict[str, Callable[[Tensor], object]] = {
        "torch sort": partial(sorted_draw, mode=mode, seen=seen),
        "transformers": processors(mode, seen),
    }
    if importlib.util.find_spec("flashinfer") is not None:
        sampling = import_module("flashinfer.sampling")
        top_k = TOP_K if mode == "full" else 1 << 30
        found["FlashInfer"] = lambda x: sampling.top_k_top_p_sampling_from_logits(x.float() / TEMPERATURE, top_k, TOP_P)
    return found


def sorted_draw(logits: Tensor, mode: str, seen: Tensor) -> Tensor:
    """By a sort of whole rows."""
    x = logits.float()
    if mode == "full":
        values = x.gather(-1, seen)
        penalised = torch.where(values > 0, values / REPETITION, values * REPETITION) - (FREQUENCY + PRESENCE)
        x = x.scatter(-1, seen, penalised)
    values, ids = x.div_(TEMPERATURE).sort(-1, descending=True)
    if mode == "full":
        values[:, TOP_K:] = -torch.inf
    weight = values.softmax(-1)
    kept = weight.masked_fill(weight.cumsum(-1) - weight >= TOP_P, 0.0)
    if mode == "full":
        kept.masked_fill_(weight < MIN_P * weight[:, :1], 0.0)
    return ids.gather(-1, kept.multinomial(1))


def processors(mode: str, seen: Tensor) -> Callable[[Tensor], Tensor]:
    """By the classes that `generate` of transformers chains; they have no penalties by count."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)])
    if mode == "full":
        chain.insert(0, RepetitionPenaltyLogitsProcessor(REPETITION))
        chain.insert(2, TopKLogitsWarper(TOP_K))
        chain.append(MinPLogitsWarper(MIN_P))

    def run(logits: Tensor) -> Tensor:
        scores: Tensor = chain(cast("Any", seen), cast("Any", logits.float()))
        return scores.softmax(-1).multinomial(1)

    return run


if __name__ == "__main__":
    main("sample", __doc__ or "", grid(V=VOCABS, case=list(CASES), B=BATCHES), prepare)

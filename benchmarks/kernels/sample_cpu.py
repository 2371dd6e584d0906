"""What does a draw cost on a CPU, beside torch's own softmax and multinomial?

Both take turns on the same rows; the ratio is the median over the pairs. Ours makes filters, log-probs and a draw that
depends on no neighbour; the other draws from the whole distribution.

    python benchmarks/kernels/sample_cpu.py [--batch 64 --vocab 49152 --pairs 25]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagefork.kernels.sample import sample

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from inputs import rows
from shared import ROOT, facts

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
MODES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "unfiltered": {},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50": {"top_k": 50},
    "top-k 1000": {"top_k": 1000},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.95, temperature 0.8": {"top_p": 0.95, "temperature": 0.8},
    "min-p 0.05": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
}
MIXED = "one mode per row"


def settings(mode: str, batch: int) -> dict[str, Any]:
    """The parameters of a mode; those of `MIXED` are tensors [batch] in which all modes take turns."""
    if mode != MIXED:
        return dict(MODES[mode])
    turns = [list(MODES.values())[row % len(MODES)] for row in range(batch)]
    return {name: torch.tensor([turn.get(name, off) for turn in turns]) for name, off in OFF.items()}


def milliseconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def measure(logits: Tensor, given: dict[str, Any], pairs: int) -> dict[str, float]:
    """Medians over the pairs, in milliseconds, and the ratio of ours to softmax and multinomial."""
    keys: dict[str, Any] = {"seed": torch.arange(len(logits)), "position": 100}
    ours, theirs = [], []
    for pair in range(-1, pairs):  # -1 is the warm-up
        times = [
            milliseconds(lambda: sample(logits, **given, **keys)),
            milliseconds(lambda: torch.softmax(logits.float(), -1).multinomial(1)),
        ]
        if pair >= 0:
            ours.append(times[0])
            theirs.append(times[1])
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {"ms": statistics.median(ours), "softmax_multinomial_ms": statistics.median(theirs), "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--pairs", type=int, default=25)
    types = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", default=types[:2], choices=types)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/sample_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = {name: getattr(args, name) for name in ("batch", "vocab", "pairs")}
    result: dict[str, Any] = {**facts(), "load": load, "cases": []}
    for dtype, kind in itertools.product(args.dtypes, ("peaked", "flat")):
        logits = rows(kind, args.batch, args.vocab, 0, torch.device("cpu"), getattr(torch, dtype))
        for mode in (*MODES, MIXED):
            found = measure(logits, settings(mode, args.batch), args.pairs)
            result["cases"].append({"dtype": dtype, "rows": kind, "mode": mode, **found})
            print(
                f"{dtype:<8} {kind:<6} {mode:<27} {found['ms']:7.2f} ms, "
                f"softmax + multinomial {found['softmax_multinomial_ms']:7.2f} ms: {found['ratio']:.2f} times",
                flush=True,
            )
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What does a draw cost on a CPU, beside torch's own softmax and multinomial?

Both take turns on the same rows; the ratio is the median over the pairs. Ours makes filters, log-probs and a draw that
depends on no neighbour; the other draws from the whole distribution.

    python benchmarks/kernels/sample_cpu.py [--batch 64 --vocab 49152 --pairs 25]
"""

from __future__ import annotations

import argparse
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

MODES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "unfiltered": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


def milliseconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def measure(logits: Tensor, settings: dict[str, Any], pairs: int) -> dict[str, float]:
    """Medians over the pairs, in milliseconds, and the ratio of ours to softmax and multinomial."""
    keys: dict[str, Any] = {"seed": torch.arange(len(logits)), "position": 100}
    ours, theirs = [], []
    for pair in range(-1, pairs):  # -1 is the warm-up
        times = [
            milliseconds(lambda: sample(logits, **settings, **keys)),
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
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/sample_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = {name: getattr(args, name) for name in ("batch", "vocab", "pairs", "dtype")}
    result: dict[str, Any] = {**facts(), "load": load, "cases": []}
    for kind in ("peaked", "flat"):
        logits = rows(kind, args.batch, args.vocab, 0, torch.device("cpu"), getattr(torch, args.dtype))
        for mode, settings in MODES.items():
            found = measure(logits, settings, args.pairs)
            result["cases"].append({"rows": kind, "mode": mode, **found})
            print(
                f"{kind:<7} {mode:<11} {found['ms']:7.2f} ms, softmax + multinomial {found['softmax_multinomial_ms']:7.2f} ms: "
                f"{found['ratio']:.2f} times",
                flush=True,
            )
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What does `batch_invariant` cost?

Two engines in one process, one with `batch_invariant=True` and one with False, alternate on the same prompts: a load of
short prompts that is mostly decoding, and one of long prompts that is mostly prefill. Each pair has prompts of its own,
so that no prefix is in a cache. The ratio is True's time by False's, the median over the pairs; beside wall time stands
the CPU time of the process, which other work on the machine disturbs less.

    python benchmarks/batch_invariant.py [--loads 16x128+64 4x1024+16 --pairs 5]

Without --model it makes a Llama of 134.5 M parameters with random weights in .cache/. Writes a JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pagefork import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from shared import RANDOM_LLAMA, ROOT, facts, random_llama

Load = tuple[int, int, int]  # prompts, their tokens, tokens generated for each


def parse_load(text: str) -> Load:
    prompts, _, lengths = text.partition("x")
    given, _, generated = lengths.partition("+")
    return int(prompts), int(given), int(generated)


def measure(engines: dict[bool, LLM], load: Load, pairs: int, seed: int) -> list[dict[str, Any]]:
    """One entry per run; the engine that begins changes from pair to pair."""
    prompts, given, generated = load
    draw = random.Random(seed)
    runs = []
    for pair in range(-1, pairs):  # -1 is the warm-up
        batch = [[draw.randrange(10, 4000) for _ in range(given)] for _ in range(prompts)]
        params = SamplingParams(top_p=0.95, max_tokens=generated if pair >= 0 else 2, ignore_eos=True)
        for batch_invariant in sorted(engines, reverse=pair % 2 == 0):
            wall, cpu = time.perf_counter(), time.process_time()
            engines[batch_invariant].generate(batch, params, use_tqdm=False)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if pair >= 0:
                runs.append({"batch_invariant": batch_invariant, "pair": pair, "seconds": wall, "cpu_seconds": cpu})
                print(f"pair {pair}  batch_invariant={batch_invariant!s:<5}  {wall:6.2f} s  {cpu:6.2f} s CPU", flush=True)
    return runs


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    out = {}
    for clock in ("seconds", "cpu_seconds"):
        off, on = ([run[clock] for run in sorted(runs, key=lambda run: run["pair"]) if run["batch_invariant"] == value]
                   for value in (False, True))  # fmt: skip
        ratios = [b / a for a, b in zip(off, on, strict=True)]
        out[clock] = {
            "lowest": {"off": min(off), "on": min(on)},
            "ratio": {"median": statistics.median(ratios), "of_lowest": min(on) / min(off)},
        }
    return out


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or hub id")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--loads", nargs="+", type=parse_load, default=[(16, 128, 64), (4, 1024, 16)], metavar="PxI+O")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "batch_invariant.json")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = args.model or random_llama()
    engines = {
        value: LLM(model, dtype=args.dtype, num_threads=args.threads, num_blocks=600, batch_invariant=value)
        for value in (False, True)
    }
    result: dict[str, Any] = {
        **facts(),
        "model": args.model or RANDOM_LLAMA,
        "dtype": args.dtype,
        "loads": [],
    }
    for load in args.loads:
        runs = measure(engines, load, args.pairs, args.seed)
        summary = summarise(runs)
        names = dict(zip(("prompts", "input_len", "output_len"), load, strict=True))
        result["loads"].append({**names, "summary": summary, "runs": runs})
        ratios = {clock: round(found["ratio"]["median"], 3) for clock, found in summary.items()}
        print(f"{load[0]} x ({load[1]} + {load[2]}): time with batch_invariant by time without: {ratios}")
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

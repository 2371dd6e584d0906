"""Two engines on one load: run in turn in one process, compared pair by pair."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Engine = Callable[[list[list[int]], int], int]  # (prompts, output length) -> tokens generated


def transformers_engine(model: str, dtype: str, **settings: Any) -> Engine:
    """`generate` of transformers with these settings; end tokens are ignored."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    lm.to("cuda" if torch.cuda.is_available() else "cpu")
    lm.generation_config.eos_token_id = None
    lm.generation_config.pad_token_id = 0

    def run(prompts: list[list[int]], length: int) -> int:
        ids = torch.tensor(prompts, device=lm.device)
        out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **settings)
        return int(out.shape[0] * (out.shape[1] - ids.shape[1]))

    return run


def measure(engines: dict[str, Engine], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per run: engine, pair, seconds and output tokens per second.

    After a warm-up the engines alternate, A B A B. Each pair has random prompts of its own, so that no prefix is in a
    cache. `args` has prompts, input_len, output_len, pairs and seed.
    """
    draw = random.Random(args.seed)
    runs = []
    for pair in range(-1, args.pairs):  # -1 is the warm-up
        prompts = [[draw.randrange(10, 4000) for _ in range(args.input_len)] for _ in range(args.prompts)]
        for name, run in engines.items():
            start = time.perf_counter()
            tokens = run(prompts, args.output_len if pair >= 0 else 4)
            seconds = time.perf_counter() - start
            if pair < 0:
                continue
            if tokens != args.prompts * args.output_len:
                raise RuntimeError(f"{name} generated {tokens} tokens instead of {args.prompts * args.output_len}")
            runs.append({"engine": name, "pair": pair, "seconds": seconds, "tokens_per_second": tokens / seconds})
            print(f"pair {pair}  {name:<12}  {seconds:7.2f} s  {tokens / seconds:8.1f} output tokens/s", flush=True)
    return runs


def summarise(runs: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Median rates, and the ratio of the first engine to the second over the pairs."""
    rates = {name: [run["tokens_per_second"] for run in runs if run["engine"] == name] for name in names}
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    return {
        "median_tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
    }


def add_load(parser: argparse.ArgumentParser, prompts: int, input_len: int, output_len: int) -> None:
    """The flags of a load, with their defaults."""
    parser.add_argument("--model", help="a checkpoint directory; default: a random Llama of 134.5 M parameters")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--input-len", type=int, default=input_len)
    parser.add_argument("--output-len", type=int, default=output_len)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, checked."""
    args = parser.parse_args()
    if min(args.prompts, args.input_len, args.output_len, args.pairs) < 1:
        parser.error("--prompts, --input-len, --output-len and --pairs must be at least 1")
    return args

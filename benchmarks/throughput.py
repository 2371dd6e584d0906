"""How many tokens per second, prefill included, beside `generate` of transformers?

A batch of random prompts is sampled (top_p 0.95, end tokens ignored) by both engines in one process: the same weights,
prompts, lengths, dtype and threads. After a warm-up the engines alternate, A B A B, and each pair has prompts of
its own, so that no prefix is in a cache. The ratio is the median over the pairs.

    python benchmarks/throughput.py [--prompts 16 --input-len 128 --output-len 64 --pairs 3]

Without --model it makes a Llama of 134.5 M parameters with random weights in .cache/. Writes a JSON and a PNG.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pagefork import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from shared import RANDOM_LLAMA, ROOT, facts, random_llama

TOP_P = 0.95
Engine = Callable[[list[list[int]], int], int]  # (prompts, output length) -> tokens generated


def pagefork_engine(model: str, dtype: str, sequences: int) -> Engine:
    llm = LLM(model, dtype=dtype, max_num_seqs=max(256, sequences))

    def run(prompts: list[list[int]], length: int) -> int:
        params = SamplingParams(top_p=TOP_P, max_tokens=length, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


def transformers_engine(model: str, dtype: str) -> Engine:
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    lm.to("cuda" if torch.cuda.is_available() else "cpu")
    lm.generation_config.eos_token_id = None
    lm.generation_config.pad_token_id = 0

    def run(prompts: list[list[int]], length: int) -> int:
        ids = torch.tensor(prompts, device=lm.device)
        mask = torch.ones_like(ids)
        out = lm.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=TOP_P, top_k=0, max_new_tokens=length)
        return int(out.shape[0] * (out.shape[1] - ids.shape[1]))

    return run


def measure(engines: dict[str, Engine], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per run: engine, pair, seconds and output tokens per second."""
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
    rates = {name: [run["tokens_per_second"] for run in runs if run["engine"] == name] for name in names}
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    return {
        "median_tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
    }


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """Output tokens per second of every run, engines side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    names = list(result["summary"]["median_tokens_per_second"])
    for at, name in enumerate(names):
        rates = [run["tokens_per_second"] for run in result["runs"] if run["engine"] == name]
        bar = axes.bar([pair + 0.4 * at for pair in range(len(rates))], rates, width=0.38, label=name)
        axes.bar_label(bar, fmt="%.0f", fontsize=8)
    axes.set_xticks([pair + 0.2 for pair in range(len(rates))], [f"pair {pair + 1}" for pair in range(len(rates))])
    axes.set_ylabel("output tokens/s")
    load, ratio = result["load"], result["summary"]["ratio"]
    axes.set_title(
        f"{load['prompts']} x ({load['input_len']} + {load['output_len']}) tokens, {load['dtype']}: "
        f"{ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})",
        fontsize=10,
    )
    axes.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory; default: a random Llama of 134.5 M parameters")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder for throughput.json and throughput.png"
    )
    args = parser.parse_args()
    if min(args.prompts, args.input_len, args.output_len, args.pairs) < 1:
        parser.error("--prompts, --input-len, --output-len and --pairs must be at least 1")

    torch.manual_seed(args.seed)
    model = args.model or random_llama()
    engines = {
        "pagefork": pagefork_engine(model, args.dtype, args.prompts),
        "transformers": transformers_engine(model, args.dtype),
    }
    runs = measure(engines, args)
    summary = summarise(runs, list(engines))
    load = {name: getattr(args, name) for name in ("prompts", "input_len", "output_len", "dtype", "seed")} | {"top_p": TOP_P}
    result = {
        **facts(),
        "model": args.model or RANDOM_LLAMA,
        "load": load,
        "summary": summary,
        "runs": runs,
    }
    ratio = summary["ratio"]
    print(f"pagefork / transformers: {ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "throughput.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_chart(result, args.out / "throughput.png")


if __name__ == "__main__":
    main()

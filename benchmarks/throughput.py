"""How many tokens per second, prefill included, beside `generate` of transformers?

A batch of random prompts is sampled (top_p 0.95, end tokens ignored) by both engines in one process: the same weights,
prompts, lengths, dtype and threads. The engines take turns; the ratio is the median over the pairs.

    python benchmarks/throughput.py [--prompts 16 --input-len 128 --output-len 64 --pairs 3]

Without --model it makes a Llama of 134.5 M parameters with random weights in .cache/. Writes a JSON and a PNG.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pagefork import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from paired import Engine, add_load, measure, parsed, summarise, transformers_engine
from shared import RANDOM_LLAMA, ROOT, facts, random_llama

TOP_P = 0.95


def pagefork_engine(model: str, dtype: str, sequences: int) -> Engine:
    llm = LLM(model, dtype=dtype, max_num_seqs=max(256, sequences))

    def run(prompts: list[list[int]], length: int) -> int:
        params = SamplingParams(top_p=TOP_P, max_tokens=length, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


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
    add_load(parser, prompts=16, input_len=128, output_len=64)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder for throughput.json and throughput.png"
    )
    args = parsed(parser)
    torch.manual_seed(args.seed)
    model = args.model or random_llama()
    engines = {
        "pagefork": pagefork_engine(model, args.dtype, args.prompts),
        "transformers": transformers_engine(model, args.dtype, do_sample=True, temperature=1.0, top_p=TOP_P, top_k=0),
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

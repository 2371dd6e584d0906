"""How many tokens per second does beam search give, beside `generate(num_beams=...)` of transformers? And how does width cost?

Random prompts, end tokens ignored, the same weights, dtype and threads in one process; the engines take turns and the
ratio is the median over the pairs. Counted are the tokens of the best output of each prompt, prefill included.

    python benchmarks/beam.py [--prompts 8 --input-len 128 --output-len 64 --width 4 --pairs 3]
    python benchmarks/beam.py --growth [--widths 1 4 16 64 256 1024]

With --growth it measures milliseconds per step of one prompt at each width, Pagefork alone, and adds that to the JSON.
Without --model it makes a Llama of 134.5 M parameters with random weights in .cache/. Writes a JSON, and a PNG of the growth.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pagefork import LLM, BeamSearchParams

sys.path.insert(0, str(Path(__file__).parent))
from paired import Engine, add_load, measure, parsed, summarise, transformers_engine
from shared import RANDOM_LLAMA, ROOT, facts, random_llama


def pagefork_engine(model: str, dtype: str, width: int) -> Engine:
    llm = LLM(model, dtype=dtype)

    def run(prompts: list[list[int]], length: int) -> int:
        params = BeamSearchParams(beam_width=width, max_tokens=length, ignore_eos=True)
        return sum(len(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False))

    return run


def growth(model: str, dtype: str, widths: list[int], input_len: int, steps: int) -> list[dict[str, float]]:
    """Milliseconds per step at each width, from runs of one token and of `steps` more; the better of two."""
    llm = LLM(model, dtype=dtype, max_num_seqs=max(256, *widths), max_num_batched_tokens=2 * max(1024, *widths))
    draw = random.Random(0)
    found = []
    for width in widths:
        times = []
        for _ in range(2):
            prompt = [draw.randrange(10, 4000) for _ in range(input_len)]
            seconds = []
            for length in (1, 1 + steps):  # the second finds the prompt in the cache, but for its last block
                start = time.perf_counter()
                llm.generate([prompt], BeamSearchParams(beam_width=width, max_tokens=length, ignore_eos=True), use_tqdm=False)
                seconds.append(time.perf_counter() - start)
            times.append((seconds[1] - seconds[0]) / steps)
        found.append({"width": width, "ms_per_step": 1000 * min(times), "us_per_beam": 1e6 * min(times) / width})
        print(
            f"width {width:5}: {found[-1]['ms_per_step']:9.1f} ms per step, {found[-1]['us_per_beam']:9.1f} us per beam",
            flush=True,
        )
    return found


def draw_chart(found: list[dict[str, float]], path: Path) -> None:
    """Time per step against width, both logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    widths = [point["width"] for point in found]
    axes.loglog(widths, [point["ms_per_step"] for point in found], marker="o", label="measured")
    first = found[0]["ms_per_step"]
    axes.loglog(widths, [first * width / widths[0] for width in widths], linestyle=":", label="in proportion to the width")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_xlabel("beam width")
    axes.set_ylabel("ms per step")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_load(parser, prompts=8, input_len=128, output_len=64)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--growth", action="store_true", help="measure the growth with the width instead of the pairs")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=16, help="steps per width of --growth")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for beam.json and beam.png")
    args = parsed(parser)
    if min(args.width, args.steps, *args.widths) < 1:
        parser.error("--width, --widths and --steps must be at least 1")

    torch.manual_seed(args.seed)
    model = args.model or random_llama()
    path = args.out / "beam.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    args.out.mkdir(parents=True, exist_ok=True)
    if args.growth:
        found = growth(model, args.dtype, args.widths, args.input_len, args.steps)
        load = {"input_len": args.input_len, "steps": args.steps, "dtype": args.dtype}
        result["growth"] = {**facts(), "model": args.model or RANDOM_LLAMA, "load": load, "widths": found}
        draw_chart(found, args.out / "beam.png")
    else:
        engines = {
            "pagefork": pagefork_engine(model, args.dtype, args.width),
            "transformers": transformers_engine(model, args.dtype, do_sample=False, num_beams=args.width),
        }
        runs = measure(engines, args)
        summary = summarise(runs, list(engines))
        load = {name: getattr(args, name) for name in ("prompts", "input_len", "output_len", "width", "dtype", "seed")}
        result["pairs"] = {**facts(), "model": args.model or RANDOM_LLAMA, "load": load, "summary": summary, "runs": runs}
        ratio = summary["ratio"]
        print(f"pagefork / transformers: {ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

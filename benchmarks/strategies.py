"""Which decoding strategy for what? Speed, cost, quality and diversity of each, on the demo model.

Prompts are the beginnings of modules of the standard library that the demo model was not trained on. Every strategy goes on
from all of them, in one batch. Reported per strategy:

    tokens/s               output tokens of the returned outputs per second, prefill included
    forward/token          tokens computed per output token, of the outputs returned
    log-prob               mean log-prob per token that the model gives the outputs
    rep-n                  1 - distinct n-grams / n-grams within an output, in percent, for n = 2, 3, 4
    diversity              product over n of (1 - rep-n), in percent (Su and Xu 2022)
    parses                 share of outputs, cut at the last complete line, with which the prompt parses as Python

with 95 % bootstrap intervals over prompts. The second part asks whether tree search pays: Monte Carlo tree search guided by
a value function, against the best of n samples ranked by the same function, n chosen so that both compute as many tokens.

    python benchmarks/strategies.py [--prompts 200 --tokens 96] [--part table|search]

Writes strategies.json and strategies.png. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pagefork import LLM, BeamSearchParams, ContrastiveSearchParams, MCTSParams, RequestOutput, SamplingParams
from pagefork.demo.train import sources
from pagefork.value_functions import VALUE_FUNCTIONS, ValueFunction, parses_as_python

sys.path.insert(0, str(Path(__file__).parent))
from shared import ROOT, facts

PROMPT_TOKENS = 64
Params = SamplingParams | BeamSearchParams | ContrastiveSearchParams | MCTSParams


class Row(NamedTuple):
    """A strategy of the table, and when it is the one to take."""

    params: Params
    use: str


def strategies(tokens: int) -> dict[str, Row]:
    common: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True}
    seeded = {**common, "seed": 0}
    return {
        "greedy": Row(SamplingParams(temperature=0, **common), "one right answer; repeats itself in long texts"),
        "sampling": Row(SamplingParams(**seeded), "to see what the model believes, unfiltered"),
        "top-p 0.95": Row(SamplingParams(top_p=0.95, **seeded), "open-ended text"),
        "top-k 50": Row(SamplingParams(top_k=50, **seeded), "open-ended text, a fixed number of choices"),
        "min-p 0.1": Row(SamplingParams(min_p=0.1, **seeded), "open-ended text at high temperature"),
        "best of 8": Row(SamplingParams(best_of=8, top_p=0.95, **seeded), "when one of several samples can be told to be best"),
        "beam 4": Row(BeamSearchParams(beam_width=4, **common), "short outputs with one right answer: translation, spelling"),
        "diverse beam 4 / 2": Row(
            BeamSearchParams(beam_width=4, num_beam_groups=2, diversity_penalty=0.5, **common), "several good answers that differ"
        ),
        "contrastive": Row(ContrastiveSearchParams(**common), "open-ended text without draws"),
        "MCTS 16": Row(MCTSParams(num_simulations=16, **seeded), "a value that can be computed guides the search"),
    }


def held_out(llm: LLM, count: int, seed: int = 0) -> list[list[int]]:
    """Beginnings of parts of modules that the demo model did not see; they are Python, but for where they break off."""
    texts = [text for i, text in enumerate(sources()) if i % 20 == 0]
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    while len(prompts) < count:
        lines = draw.choice(texts).splitlines(keepends=True)
        first = draw.randrange(len(lines))
        ids = tokenizer.encode("".join(lines[first : first + 30]))[:PROMPT_TOKENS]
        text = tokenizer.decode(ids)
        if len(ids) == PROMPT_TOKENS and lines[first][:1] not in (" ", "\n") and parses_as_python()([_Text(text)]) == [1.0]:
            prompts.append(ids)
    return prompts


def repetition(tokens: Sequence[int], n: int) -> float:
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def parses(prompt: str, text: str) -> bool:
    """Whether the prompt and the complete lines of the text are Python; a block that is open at the end is closed."""
    lines = (prompt + text).split("\n")[:-1]
    for end in (len(lines), len(lines) - 1):
        source = "\n".join(lines[:end])
        last = next((line for line in reversed(lines[:end]) if line.strip()), "")
        indent = len(last) - len(last.lstrip())
        for closing in ("", "\n" + " " * indent + "pass", "\n" + " " * (indent + 4) + "pass"):
            try:
                ast.parse(source + closing)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            return True
    return False


def interval(values: Sequence[float], resamples: int = 2000) -> dict[str, float]:
    """Mean, with the 95 % bootstrap interval."""
    draw = random.Random(0)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    return {"mean": sum(values) / len(values), "low": means[int(0.025 * resamples)], "high": means[int(0.975 * resamples)]}


def score(prompt: str, output: RequestOutput) -> dict[str, float]:
    best = output.outputs[0]
    reps = {n: repetition(best.token_ids, n) for n in (2, 3, 4)}
    diversity = (1 - reps[2]) * (1 - reps[3]) * (1 - reps[4])
    return {
        "log_prob": best.cumulative_logprob / max(1, len(best.token_ids)),
        **{f"rep_{n}": 100 * rep for n, rep in reps.items()},
        "diversity": 100 * diversity,
        "parses": 100.0 * parses(prompt, best.text),
    }


def measured(llm: LLM, prompts: list[list[int]], params: Params) -> dict[str, Any]:
    """All prompts in one batch: rates, and every score with its interval."""
    before = llm.engine.stats().forward_tokens
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert llm.engine.tokenizer is not None
    texts = [llm.engine.tokenizer.decode(prompt) for prompt in prompts]
    scores = [score(text, output) for text, output in zip(texts, outputs, strict=True)]
    return {
        "tokens_per_second": tokens / seconds,
        "forward_tokens_per_token": (llm.engine.stats().forward_tokens - before) / tokens,
        **{name: interval([found[name] for found in scores]) for name in scores[0]},
    }


def table(llm: LLM, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    found = {}
    for name, row in strategies(tokens).items():
        found[name] = measured(llm, prompts, row.params) | {"use": row.use}
        line = found[name]
        rates = f"{line['tokens_per_second']:8.0f} tokens/s {line['forward_tokens_per_token']:7.1f} forward/token"
        quality = " ".join(f"{line[key]['mean']:8.2f} {key}" for key in ("log_prob", "diversity", "parses"))
        print(f"{name:<20} {rates} {quality}", flush=True)
    return found


def markdown(rows: dict[str, Any]) -> str:
    """The table as README has it: means, with half the width of the 95 % interval where that says something."""
    lines = [
        "| strategy | tokens/s | computed per token | log-prob per token | rep-2 / 3 / 4, % | diversity, % | parses, % | for |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        reps = " / ".join(f"{row[f'rep_{n}']['mean']:.0f}" for n in (2, 3, 4))
        cells = [name, f"{row['tokens_per_second']:.0f}", f"{row['forward_tokens_per_token']:.1f}"]
        cells += [
            _with_error(row["log_prob"], 2),
            reps,
            _with_error(row["diversity"], 0),
            _with_error(row["parses"], 0),
            row["use"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_error(value: dict[str, float], digits: int) -> str:
    return f"{value['mean']:.{digits}f} ± {(value['high'] - value['low']) / 2:.{digits}f}"


def search(llm: LLM, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Tree search against best-of-n by one value function, at an equal number of computed tokens."""
    assert llm.engine.tokenizer is not None
    texts = [llm.engine.tokenizer.decode(prompt) for prompt in prompts]
    common: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "seed": 0}
    found = {}
    for name, make in VALUE_FUNCTIONS.items():
        values = [make(text) for text in texts]
        trees = [MCTSParams(num_simulations=16, c_puct=0.1, value_fn=value, **common) for value in values]
        spent, ours = _values(llm, prompts, trees, values)
        n = max(1, round(spent / (len(prompts) * tokens)))
        best = [SamplingParams(best_of=n, rank_by=partial(_rank, value), **common) for value in values]
        spent_best, theirs = _values(llm, prompts, best, values)
        gain = interval([tree - sampled for tree, sampled in zip(ours, theirs, strict=True)])
        found[name] = {
            "tree_search": interval(ours) | {"forward_tokens": spent},
            "best_of_n": interval(theirs) | {"forward_tokens": spent_best, "n": n},
            "gain": gain,
        }
        print(f"{name}: tree {found[name]['tree_search']}, best of {n} {found[name]['best_of_n']}, gain {gain}", flush=True)
    return found


def _rank(value: ValueFunction, candidate: Any) -> float:
    return value([candidate])[0]


def _values(
    llm: LLM, prompts: list[list[int]], params: Sequence[Params], values: Sequence[ValueFunction]
) -> tuple[int, list[float]]:
    """Tokens computed, and what each output is worth."""
    before = llm.engine.stats().forward_tokens
    outputs = llm.generate(prompts, list(params), use_tqdm=False)
    worth = [value([_whole(output)])[0] for value, output in zip(values, outputs, strict=True)]
    return llm.engine.stats().forward_tokens - before, worth


class _Text(NamedTuple):
    """A text as a value function sees a leaf."""

    text: str
    token_ids: Sequence[int] = ()
    cumulative_logprob: float = 0.0
    prompt_token_ids: Sequence[int] = ()
    finish_reason: str | None = None


def _whole(request: RequestOutput) -> _Text:
    best = request.outputs[0]
    return _Text(best.text, best.token_ids, best.cumulative_logprob, request.prompt_token_ids, best.finish_reason)


def draw_chart(found: dict[str, Any], path: Path) -> None:
    """Diversity against log-prob, one point per strategy, with intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, row in found.items():
        x, y = row["log_prob"], row["diversity"]
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
            marker="o",
            linestyle="none",
        )
        axes.annotate(name, (x["mean"], y["mean"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("mean log-prob per token")
    axes.set_ylabel("diversity, %")
    axes.margins(x=0.15, y=0.1)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=96, help="output tokens per prompt")
    parser.add_argument("--part", choices=["table", "search"], help="only this part; default: both")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the JSON and the PNG")
    args = parser.parse_args()
    if min(args.prompts, args.tokens) < 1:
        parser.error("--prompts and --tokens must be at least 1")
    llm = LLM("demo", max_num_seqs=1024, max_num_batched_tokens=4096)
    prompts = held_out(llm, args.prompts)
    path = args.out / "strategies.json"
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    load = {"prompts": args.prompts, "prompt_tokens": PROMPT_TOKENS, "tokens": args.tokens, "model": "demo"}
    if args.part != "search":
        result["table"] = {**facts(), "load": load, "rows": table(llm, prompts, args.tokens)}
        print(markdown(result["table"]["rows"]))
        draw_chart(result["table"]["rows"], args.out / "strategies.png")
    if args.part != "table":
        result["search"] = {**facts(), "load": load, "values": search(llm, prompts, args.tokens)}
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What do 8-bit weights, and bfloat16, cost in quality? Perplexity of held-out text, and whether greedy tokens stay the same.

The text is every twentieth module of the standard library of the interpreter that runs this, those that the demo model's
recipe (engine/demo/train.py) keeps from training, each after an end-of-text token; the demo model was trained on CPython
3.11.7. It is cut into rows of 1023 tokens, and our own `prompt_logprobs` say how probable each token is after those before
it in its row. Reported for each way to hold the weights:

    nats per token      mean of -log p, and exp of it, the perplexity
    against float32     the mean of the difference at every token, with its standard error
    best token          the share of tokens before which the most probable next token is float32's
    greedy              of continuations of 64 tokens, how many are float32's, and after how many tokens they part, on average

    python benchmarks/perplexity.py [--rows 64] [--model demo]

Writes a JSON. Takes a minute or two on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from pagefork import LLM, SamplingParams
from pagefork.demo.train import sources

sys.path.insert(0, str(Path(__file__).parent))
from shared import ROOT, facts

ROW = 1023  # tokens; with the one that is generated the demo model's context
PROMPT, GREEDY = 64, 64  # tokens of a prompt, and of its continuation
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, float32": {"dtype": "float32", "quantization": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
}


class Found(NamedTuple):
    """Of every scored token in the order of the text, and of every continuation."""

    logprobs: list[float]
    best: list[int]  # the most probable token in its place
    greedy: list[list[int]]
    weights_memory: int


def held_out(llm: LLM) -> list[list[int]]:
    """The text in rows of ROW tokens; the rest is left."""
    tokenizer, end = llm.engine.tokenizer, 0
    assert tokenizer is not None
    tokens = [token for text in sources()[::20] for token in (end, *tokenizer.encode(text))]
    return [tokens[at : at + ROW] for at in range(0, len(tokens) - ROW, ROW)]


def measure(settings: dict[str, Any], model: str, count: int) -> Found:
    llm = LLM(model, num_blocks=2000, enable_prefix_caching=False, **settings)
    rows = held_out(llm)[:count]
    scored = llm.generate(rows, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    logprobs, best = [], []
    for row, output in zip(rows, scored, strict=True):
        for token, entries in zip(row[1:], (output.prompt_logprobs or [])[1:], strict=True):
            assert entries is not None
            logprobs.append(entries[token].logprob)
            best.append(next(other for other, entry in entries.items() if entry.rank == 1))
    params = SamplingParams(temperature=0, max_tokens=GREEDY, ignore_eos=True)
    outputs = llm.generate([row[:PROMPT] for row in rows], params, use_tqdm=False)
    return Found(logprobs, best, [output.outputs[0].token_ids for output in outputs], llm.engine.info()["weights_memory"])


def compared(found: Found, exact: Found) -> dict[str, Any]:
    """The numbers of a way to hold the weights, beside those of float32."""
    loss = -statistics.fmean(found.logprobs)
    more = [b - a for a, b in zip(found.logprobs, exact.logprobs, strict=True)]
    same = [a == b for a, b in zip(found.best, exact.best, strict=True)]
    pairs = list(zip(found.greedy, exact.greedy, strict=True))
    shared = [len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))) for a, b in pairs]
    return {
        "weights_memory": found.weights_memory,
        "nats_per_token": loss,
        "perplexity": math.exp(loss),
        "more_nats_than_float32": {"mean": statistics.fmean(more), "standard_error": statistics.stdev(more) / len(more) ** 0.5},
        "best_token_as_in_float32": statistics.fmean(same),
        "greedy_as_in_float32": statistics.fmean(a == b for a, b in pairs),
        "greedy_tokens_until_they_part": statistics.fmean(shared),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="one whose tokenizer has the end-of-text token 0, as the demo model's")
    parser.add_argument("--rows", type=int, default=64, help="rows of text (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "perplexity.json")
    args = parser.parse_args()
    found = {name: measure(settings, args.model, args.rows) for name, settings in WAYS.items()}
    exact = found["float32"]
    result: dict[str, Any] = {
        **facts(),
        "model": args.model,
        "text": "every twentieth module of the standard library, held out of the demo model's training",
        "scored_tokens": len(exact.logprobs),
        "continuations": len(exact.greedy),
        "ways": {name: compared(one, exact) for name, one in found.items()},
    }
    for name, row in result["ways"].items():
        print(
            f"{name:<15} perplexity {row['perplexity']:.4f}  best token as in float32 {row['best_token_as_in_float32']:.2%}  "
            f"continuations {row['greedy_as_in_float32']:.0%}, part after {row['greedy_tokens_until_they_part']:.1f} tokens  "
            f"weights {row['weights_memory'] / 2**20:.1f} MiB"
        )
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Searches in one batch: beams, diverse beams, contrastive search, and tree search for text whose brackets match.

python examples/search.py [--model demo]
"""

from __future__ import annotations

import argparse

from pagefork import LLM, BeamSearchParams, ContrastiveSearchParams, MCTSParams, SamplingParams
from pagefork.value_functions import brackets_balance

PROMPT = "def mean(values):\n    return sum("


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    args = parser.parse_args()
    llm = LLM(args.model)
    searches = {
        "best of 8": SamplingParams(best_of=8, n=2, top_p=0.95, max_tokens=16, seed=1),
        "beam": BeamSearchParams(beam_width=4, n=2, max_tokens=16),
        "diverse beam": BeamSearchParams(beam_width=4, n=2, num_beam_groups=2, diversity_penalty=1.0, max_tokens=16),
        "contrastive": ContrastiveSearchParams(top_k=5, alpha=0.6, max_tokens=16),
        "tree search": MCTSParams(num_simulations=32, value_fn=brackets_balance(PROMPT), max_tokens=16),
    }
    requests = llm.generate([PROMPT] * len(searches), list(searches.values()), use_tqdm=False)
    for name, request in zip(searches, requests, strict=True):
        cost = request.metrics
        print(f"{name}: {cost.forward_tokens} tokens computed, {cost.forks} forks, {cost.shared_block_ratio:.0%} of blocks saved")
        for output in request.outputs:
            score = "" if output.score is None else f" (score {output.score:.3f})"
            print(f"  {output.index}: {output.text!r}{score}")
    stats = llm.engine.stats()
    print(f"{stats.generated_tokens} tokens in {stats.steps} steps; {stats.free_blocks} of {stats.num_blocks} blocks are free")


if __name__ == "__main__":
    main()

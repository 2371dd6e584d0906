"""Many prompts in one batch, each with parameters of its own: greedy, several outputs, the best of many, a stop text.

    python examples/offline_batch.py [--model DIRECTORY_OR_HUB_ID]

The outputs of one prompt are forks: they share its cache blocks, and it is computed once.
"""

from __future__ import annotations

import argparse

from pagefork import LLM, SamplingParams

REQUESTS = {
    "def read_lines(path):\n": SamplingParams(temperature=0, max_tokens=24),
    "import os\nimport ": SamplingParams(n=3, temperature=0.8, top_p=0.95, max_tokens=12, seed=1),
    "class Queue:\n    def ": SamplingParams(n=1, best_of=6, temperature=1.0, max_tokens=12, seed=2),
    "for i in range(": SamplingParams(temperature=0.5, max_tokens=48, stop=["\n"], seed=3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    llm = LLM(parser.parse_args().model)

    for request in llm.generate(list(REQUESTS), list(REQUESTS.values()), use_tqdm=False):
        print(f"{request.prompt!r}")
        for output in request.outputs:
            mean = output.cumulative_logprob / len(output.token_ids)
            print(f"  {output.index}: {output.text!r}")
            print(f"     {len(output.token_ids)} tokens of mean log-prob {mean:.2f}, {output.finish_reason}")

    stats = llm.engine.stats()
    print(f"{stats.prompt_tokens} prompt tokens, {stats.forks} forks, {stats.generated_tokens} tokens in {stats.steps} steps")


if __name__ == "__main__":
    main()

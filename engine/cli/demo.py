"""`pagefork demo`: several prompts and their forks in one batch."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pagefork.cli.generate import run
from pagefork.cli.text import label
from pagefork.cli.view import choose_view
from pagefork.config import EngineConfig
from pagefork.scheduler.params import SamplingParams

PROMPTS = [
    'class Queue:\n    """A queue of items.',
    "def read_lines(path):\n",
    "import os\nimport sys\n",
    "    def __init__(self, ",
]
OUTPUTS = 2


def demo(
    *,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every output")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other texts")] = 0,
) -> None:
    """Complete four Python prompts, each forked into two outputs, in one batch on the demo model."""
    from pagefork import LLMEngine

    params = SamplingParams(n=OUTPUTS, temperature=0.7, top_p=0.95, max_tokens=max_tokens, ignore_eos=True)
    engine = LLMEngine(EngineConfig(model="demo", seed=seed))
    for index, prompt in enumerate(PROMPTS):
        print(f"[{index + 1}] {label(prompt)}")
    start = time.perf_counter()
    run(engine, PROMPTS, [params] * len(PROMPTS), choose_view(PROMPTS, OUTPUTS))
    seconds = time.perf_counter() - start
    stats = engine.stats()
    rate = stats.generated_tokens / seconds
    print(f"\n{len(PROMPTS)} prompts, {stats.prompt_tokens} tokens, computed once for {len(PROMPTS) * OUTPUTS} outputs;")
    print(f"{stats.generated_tokens} tokens in {stats.steps} steps, {seconds:.1f} s, {rate:.0f} tokens/s.")

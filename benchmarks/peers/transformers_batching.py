"""Continuous batching of transformers, which has no beam search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peers.protocol import TOP_P, Load, Unsupported, versions
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

BLOCK = 32  # tokens of a cache block
TOKENS = 2048  # of a step


class Batching:
    """A model of one dtype."""

    def __init__(self, model: Path, variant: str) -> None:
        self._lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, variant), attn_implementation="sdpa").eval()
        self._lm.generation_config.eos_token_id, self._lm.generation_config.pad_token_id = None, 0
        self.settings = f"{variant}, sdpa, {TOKENS} tokens per step"

    def prepare(self, load: Load) -> Callable[[], int]:
        if load.beam is not None:
            raise Unsupported("no beam search")
        prompts = load.token_ids()
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=TOP_P, top_k=0, max_new_tokens=load.output, eos_token_id=-1, pad_token_id=0
        )
        blocks = load.prompts * -(-(load.input + load.output + 1) // BLOCK) + 8
        cache = ContinuousBatchingConfig(num_blocks=blocks, page_size=BLOCK, max_batch_tokens=TOKENS)

        def run() -> int:
            results = self._lm.generate_batch(
                inputs=prompts, generation_config=settings, continuous_batching_config=cache, progress_bar=False
            )
            return sum(len(result.generated_tokens) for result in results.values())

        return run


def start(model: Path, variant: str, folder: Path) -> tuple[Batching, dict[str, str]]:
    return Batching(model, variant), versions("transformers", "torch")

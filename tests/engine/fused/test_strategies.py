"""An engine that reads logits by the fused kernels generates what one that reads them in torch does, for every strategy."""

from __future__ import annotations

from typing import Any

import torch
from support.engine_pair import Pair
from support.strategies import PROMPTS, STRATEGIES

FEATURES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.3,
    "no_repeat_ngram_size": 2,
    "logit_bias": {10: 3.0, 300: -5.0, 400: 0.0},
    "bad_words": ["import", " sys"],
    "min_tokens": 2,
    "stop": ["\n\n"],
    "logprobs": 2,
}


PROMPT = PROMPTS[2][:16]


def test_all_strategies_in_one_batch(device: torch.device) -> None:
    params = [make(max_tokens=2) for make in STRATEGIES.values()]
    Pair(device).agree([PROMPT] * len(params), params)


def test_everything_that_changes_logits(device: torch.device) -> None:
    names = ("greedy", "best_of", "diverse beam", "contrastive", "MCTS, rollouts")
    params = [STRATEGIES[name](**{"max_tokens": 3, **FEATURES}) for name in names]
    Pair(device).agree([PROMPT] * len(params), params)

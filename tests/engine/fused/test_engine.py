"""An engine that reads logits by the fused kernels: log-probs of all kinds, and sequences that come back after preemption."""

from __future__ import annotations

from typing import Any

import torch
from support.engine_pair import Pair
from support.strategies import PROMPTS, STRATEGIES

from pagefork import SamplingParams

PROMPT = PROMPTS[2]


def test_log_probs_of_all_kinds(device: torch.device) -> None:
    """Those of the prompt, of processed distributions, of the whole vocabulary, and those that the kernels leave to torch."""
    drawn: dict[str, Any] = {"max_tokens": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 7}
    cases: list[dict[str, Any]] = [
        {"prompt_logprobs": 2},
        {"logprobs": 4, "prompt_logprobs": 0, "logprobs_mode": "processed"},
        {"logprobs": 4, "prompt_logprobs": 3, "logprobs_mode": "processed", "repetition_penalty": 1.3},
        {"logprobs": -1},
        {"logprobs": 2, "allowed_token_ids": list(range(50, 80))},
        {"logprobs": 2, "logits_processors": [lambda prompt, output, logits: logits * 0.5], "frequency_penalty": 0.5},
    ]
    params = [SamplingParams(**{**drawn, **case}) for case in cases]
    pair = Pair(device)
    found = pair.agree([PROMPT[:20]] * len(cases), params)
    assert all(output.prompt_logprobs is not None for output in found[:3])
    pair.agree([PROMPT[:20]] * 4, [params[case] for case in (0, 1, 2, 4)])  # without those whose batches go through torch


def test_groups_that_are_preempted(device: torch.device) -> None:
    pair = Pair(device, num_blocks=12, block_size=4)
    params = [STRATEGIES[name](max_tokens=6, frequency_penalty=0.5, no_repeat_ngram_size=2) for name in ("best_of", "beam")]
    pair.agree([PROMPT[:12], PROMPT[7:19]], params)
    assert pair.fused.engine.stats().preemptions

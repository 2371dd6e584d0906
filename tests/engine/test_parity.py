"""The engine's greedy tokens in fp32 equal those of transformers' generate, whatever the batch and the chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from transformers import AutoModelForCausalLM

from pagefork import LLM, SamplingParams
from pagefork.demo import demo_path

LENGTHS = (1, 15, 16, 17, 255, 300)
TOKENS = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3-tied-linear": (
        "qwen3", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["demo", *VARIANTS])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts, and what transformers generates for each."""
    path = demo_path()
    if request.param == "demo":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        family, overrides = VARIANTS[request.param]
        path = tmp_path_factory.mktemp(request.param)
        model = make_checkpoint(path, family, **overrides)
    rng = np.random.default_rng(len(request.param))
    prompts = [rng.integers(3, model.config.vocab_size, length).tolist() for length in LENGTHS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            pad_token_id=0,
        )
        expected.append(found[0, len(prompt) :].tolist())
    return path, prompts, expected


@pytest.mark.parametrize("budget", [16, 2048])
def test_greedy_tokens_equal_transformers(pair: tuple[Path, list[list[int]], list[list[int]]], budget: int) -> None:
    path, prompts, expected = pair
    llm = LLM(str(path), dtype="float32", num_blocks=600, max_num_batched_tokens=budget, max_num_seqs=16)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS)
    alone = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    assert alone == expected
    order = [i % len(prompts) for i in range(16)]
    batch = llm.generate([prompts[i] for i in order], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in batch] == [expected[i] for i in order]
    llm.engine.check()

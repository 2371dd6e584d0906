"""The decoder computes what transformers computes, however its tokens are cut into rows and rows into batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.feeding import Feeder
from torch import Tensor
from transformers import PreTrainedModel

from pagefork.models.registry import Model, load_model

CPU = torch.device("cpu")
LENGTHS = [1, 15, 16, 17, 255, 300]
PROMPTS = [np.random.default_rng(n).integers(0, 331, n).tolist() for n in LENGTHS]

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1000.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 1000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": max(LENGTHS)}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 24, "tie_word_embeddings": True}),
    "mistral-linear": ("mistral", {"sliding_window": 7, "rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-window": ("qwen2", {**SLIDING, "tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN | {"truncate": False, "beta_fast": 16.0, "attention_factor": 1.3}}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "qwen3-window": ("qwen3", SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}}),
}
Cut = Callable[[int], int]  # tokens that are left -> tokens to feed


def reference(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([prompt])).logits[0]
    return logits


def feed(feeder: Feeder, prompts: list[list[int]], cut: Cut) -> list[Tensor]:
    """Logits of all positions of prompts that are fed side by side, each in the pieces that `cut` asks for."""
    done = [0] * len(prompts)
    found: list[list[Tensor]] = [[] for _ in prompts]
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        sizes = [min(cut(len(prompt) - at), len(prompt) - at) for at, prompt in zip(done, prompts, strict=True)]
        fed = [(slot, done[slot], prompts[slot][done[slot] : done[slot] + size]) for slot, size in enumerate(sizes) if size]
        if not fed:
            continue
        for (slot, start, tokens), logits in zip(fed, feeder.feed(fed), strict=True):
            done[slot] = start + len(tokens)
            found[slot].append(logits)
    return [torch.cat(pieces) for pieces in found]


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= relative * expected.abs().max()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[Tensor]]:
    """Our model, and the logits of transformers' for PROMPTS."""
    path = tmp_path_factory.mktemp(request.param)
    family, overrides = VARIANTS[request.param]
    theirs = make_checkpoint(path, family, **overrides)
    return load_model(path, torch.float32, CPU), [reference(theirs, prompt) for prompt in PROMPTS]


def random_cut(seed: int) -> Cut:
    rng = np.random.default_rng(seed)
    return lambda left: int(rng.choice([0, 1, 1, 1, 2, 5, 16, 33, 150, left]))


@pytest.mark.parametrize("cut", [lambda left: left, lambda left: 16, random_cut(1)], ids=["whole", "chunks", "mixed"])
def test_logits_equal_those_of_transformers(pair: tuple[Model, list[Tensor]], cut: Cut) -> None:
    model, expected = pair
    for found, wanted in zip(feed(Feeder(model), PROMPTS, cut), expected, strict=True):
        assert_close(found, wanted)


def test_logits_token_by_token_equal_those_of_transformers(pair: tuple[Model, list[Tensor]]) -> None:
    model, expected = pair
    for found, wanted in zip(feed(Feeder(model, block_size=8), PROMPTS[:4], lambda left: 1), expected, strict=False):
        assert_close(found, wanted)


@pytest.mark.parametrize("window", [None, 40])
def test_single_tokens_after_a_long_prompt_equal_transformers(tmp_path: Path, window: int | None) -> None:
    theirs = make_checkpoint(tmp_path, "mistral", sliding_window=window)
    [found] = feed(Feeder(load_model(tmp_path, torch.float32, CPU)), [PROMPTS[-1]], lambda left: max(1, left - 50))
    assert_close(found, reference(theirs, PROMPTS[-1]))


@pytest.mark.parametrize("block_size", [1, 3, 24, 256])
def test_any_block_size_gives_the_same_logits(tmp_path: Path, block_size: int) -> None:
    theirs = make_checkpoint(tmp_path, "qwen2", **SLIDING)
    feeder = Feeder(load_model(tmp_path, torch.float32, CPU), block_size=block_size)
    for found, prompt in zip(feed(feeder, PROMPTS, random_cut(2)), PROMPTS, strict=True):
        assert_close(found, reference(theirs, prompt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_same_weights_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = make_checkpoint(tmp_path, "qwen3", dtype=dtype).float()
    feeder = Feeder(load_model(tmp_path, dtype, CPU))
    assert feeder.cache.k.dtype == dtype
    for found, prompt in zip(feed(feeder, PROMPTS, random_cut(3)), PROMPTS, strict=True):
        assert found.dtype == dtype
        assert_close(found, reference(theirs, prompt), 0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(tmp_path: Path, dtype: torch.dtype) -> None:
    """Attention sums per row, and linear layers see at least two rows: so rows may come and go."""
    make_checkpoint(tmp_path, "llama", dtype=dtype, hidden_size=1536, intermediate_size=1536, head_dim=32)
    model = load_model(tmp_path, dtype, CPU)
    cuts = [130, 120, 20, 15, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]

    def fixed(left: int) -> int:
        done = len(PROMPTS[-1]) - left
        return cuts[next(index for index in range(len(cuts) + 1) if sum(cuts[:index]) == done)]

    [alone] = feed(Feeder(model), [PROMPTS[-1]], fixed)
    feeder, found, at = Feeder(model), [], 0
    rng = np.random.default_rng(5)
    for size in cuts:
        others = [(slot, 0, PROMPTS[int(rng.integers(6))]) for slot in range(1, int(rng.integers(1, 5)))]
        found.append(feeder.feed([*others, (0, at, PROMPTS[-1][at : at + size])])[-1])
        at += size
    assert torch.equal(torch.cat(found), alone)


def test_padding_rows_change_nothing_and_are_not_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    feeder = Feeder(load_model(tmp_path, torch.float32, CPU), block_size=4)
    [logits] = feeder.feed([(0, 0, [5])])
    assert logits.shape == (1, 331) and not logits.isnan().any()
    written = ~feeder.cache.v[0].isnan().any(dim=(1, 3))
    assert [tuple(place) for place in written.nonzero().tolist()] == [(feeder.tables[0, 0], 0)]

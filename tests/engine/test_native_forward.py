"""A native step computes what torch's layers compute, and gives the same bits however its rows are cut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.feeding import Feeder
from support.torch_path import torch_path
from torch import Tensor
from torch.nn import functional

from pagefork.batch import HostBatch, build_batch
from pagefork.cache import KVCache
from pagefork.kernels.native import library, native_isa
from pagefork.kernels.native_forward import GATES, interleaved
from pagefork.models.decoder import Decoder
from pagefork.models.registry import Model, load_model
from pagefork.scheduler.plan import LAST_TOKEN, Rows, ints

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")

ODD = {"hidden_size": 51, "intermediate_size": 37, "head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1}
SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1000.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-biases-odd": ("llama", {**ODD, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-odd": ("llama", {**ODD, "tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 24, "head_dim": 32}),
    "qwen2-window-yarn": ("qwen2", {**SLIDING, "rope_parameters": YARN}),
    "qwen3-bias-odd": ("qwen3", {**ODD, "attention_bias": True}),
    "qwen3-windows": ("qwen3", SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}),
}
LENGTHS = [1, 2, 15, 16, 17, 70, 300]
PROMPTS = [np.random.default_rng(n).integers(0, 331, n).tolist() for n in LENGTHS]


def load(path: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(path, dtype, torch.device("cpu"))


def torch_logits(path: Path, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits of PROMPTS as torch's layers have them."""
    with torch_path():
        return prompts_fed(load(path, dtype))


def prompts_fed(model: Model) -> list[Tensor]:
    return Feeder(model).feed([(slot, 0, prompt) for slot, prompt in enumerate(PROMPTS)])


@pytest.fixture(params=VARIANTS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, overrides = VARIANTS[request.param]
    make_checkpoint(tmp_path, family, **overrides)
    return tmp_path


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of all, relative to the largest logit."""
    a, b = torch.cat(found).float(), torch.cat(expected).float()
    return float((a - b).abs().max() / b.abs().max())


def test_logits_are_those_of_torchs_layers(path: Path) -> None:
    expected = torch_logits(path)
    assert error(prompts_fed(load(path)), expected) <= 1e-5
    wide = torch_logits(path, torch.bfloat16)
    assert error(prompts_fed(load(path, torch.bfloat16)), expected) <= 1.5 * error(wide, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_in_any_batch_and_in_any_chunks(path: Path, dtype: torch.dtype) -> None:
    model = load(path, dtype)
    assert isinstance(model, Decoder)
    together = prompts_fed(model)
    feeder = Feeder(model, block_size=24)
    for slot, prompt in enumerate(PROMPTS):
        [alone] = feeder.feed([(slot, 0, prompt)])
        assert torch.equal(alone, together[slot])
    for size in (1, 40):
        feeder = Feeder(model)
        prompt, parts = PROMPTS[-1], []
        for at in range(0, len(prompt), size):
            others = [(slot, 0, PROMPTS[(at + slot) % 6]) for slot in range(1, 1 + at % 3)]
            parts.append(feeder.feed([*others, (0, at, prompt[at : at + size])])[-1])
        assert torch.equal(torch.cat(parts), together[-1])
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, prompts_fed(model), together))
    finally:
        torch.set_num_threads(1)


def test_the_tokens_that_slots_drew_last_are_fed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    model = load(tmp_path)
    tables, nothing = np.arange(1, 9, dtype=np.int32).reshape(4, 2), np.empty((0, 3), np.int32)
    last, rows = torch.tensor([7, 8, 9, 10]), (ints([2, 0]), ints([0, 0]), ints([0, 1, 4]))
    found = []
    for tokens in ([LAST_TOKEN, 3, 4, 5], [9, 3, 4, 5]):
        cache = Feeder(model, slots=4, length=32).cache
        batch = build_batch(Rows(*rows, ints(tokens), nothing), tables, model.config, cache, last=last)
        found.append(model.forward(batch, cache))
        assert isinstance(batch, HostBatch) and batch.tokens.tolist() == [9, 3, 4, 5]
    assert torch.equal(*found)


def test_the_cache_gets_what_torchs_layers_write(tmp_path: Path) -> None:
    """Keys and values of the first layer, whose input both have; and states of norm 1."""
    make_checkpoint(tmp_path, "qwen3")
    native = fed_cache(load(tmp_path))
    with torch_path():
        expected = fed_cache(load(tmp_path))
    assert expected.hidden is not None and native.hidden is not None
    written = ~expected.v[0, :, 0, :, 0].isnan()  # [blocks, block size]
    assert written.sum() == 315
    assert torch.equal(~native.v[0].isnan().any(-1).any(1), written) and torch.equal(~native.k[0].isnan().any(2).any(1), written)
    for layers in ((native.v, expected.v), (native.k.mT, expected.k.mT)):
        found, wanted = (pages[0].transpose(1, 2)[written] for pages in layers)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(native.hidden[written], expected.hidden[written], rtol=1e-5, atol=1e-5)
    assert torch.equal(~native.hidden.isnan().any(-1), written)
    lengths = torch.linalg.vector_norm(native.hidden[written], dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def fed_cache(model: Model) -> KVCache:
    """A cache of NaN, and what two sequences wrote."""
    feeder = Feeder(model)
    feeder.cache.hidden = torch.full((feeder.cache.num_blocks, 16, model.config.hidden_size), torch.nan)
    feeder.feed([(0, 0, PROMPTS[-1]), (3, 0, PROMPTS[2])])
    return feeder.cache


@pytest.mark.parametrize("n", [1, GATES - 1, GATES, 2 * GATES + 5])
def test_rows_of_gate_and_up_projection_take_turns(n: int) -> None:
    gate, up = torch.randn(n, 3), torch.randn(n, 3)
    joined = interleaved(gate, up).view(-1, 2, GATES, 3)
    for side, part in enumerate((gate, up)):
        found = joined[:, side].flatten(0, 1)
        assert torch.equal(found[:n], part) and not found[n:].any()
    assert torch.equal(interleaved(gate[:, 0], up[:, 0]), interleaved(gate, up)[:, 0])


def test_embeddings_that_are_read_off_the_head_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """A model of one layer whose weights are zeros passes its embeddings on, to the norm."""
    theirs = make_checkpoint(tmp_path, tie_word_embeddings=True, **ODD)
    table = theirs.get_input_embeddings().weight.detach()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "proj" in name:
                weight.zero_()
    theirs.save_pretrained(tmp_path)
    model, tokens = load(tmp_path), [0, 31, 32, 330, 5]
    feeder = Feeder(model)
    rows = Rows(ints([0]), ints([0]), ints([0, len(tokens)]), ints(tokens), np.empty((0, 3), np.int32))
    batch = build_batch(rows, feeder.tables, model.config, feeder.cache)
    found = model.forward(batch, feeder.cache)
    norm = theirs.get_decoder().norm
    expected = functional.rms_norm(table[tokens], norm.weight.shape, norm.weight, norm.variance_epsilon)
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    if native_isa() != "avx512_bf16":
        pytest.skip("run for all of them by a machine that has the best")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "logits_are and biases"]
    done = subprocess.run(command, env={**os.environ, "PAGEFORK_NATIVE": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]

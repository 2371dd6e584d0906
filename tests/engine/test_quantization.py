"""With quantization="int8" the engine computes what the rounded weights give, in less memory, or says why it can't."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_json, make_checkpoint
from support.cli import PROMPT, assert_refused, generated, pagefork
from support.devices import tokens
from support.strategies import STRATEGIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from pagefork import LLM, ConfigError, SamplingParams
from pagefork.kernels.linear import linear_backend
from pagefork.scheduler.errors import ModelError

CPU = torch.device("cpu")
LENGTHS = (1, 17, 60, 90)
PROMPTS = [np.random.default_rng(n).integers(3, 331, n).tolist() for n in LENGTHS]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "gpt2": {},  # through transformers, its layers transposed
}


def rounded(weight: Tensor) -> Tensor:
    """To multiples of a 127th of the largest of each row."""
    weight = weight.float()
    unit = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(weight / unit) * unit


def save_rounded(path: Path, to: Path, model: Any, transposed: bool = False) -> None:
    """A copy of a checkpoint whose linear layers and head hold what int8 makes of them; the embedding is as it was."""
    shutil.copytree(path, to)
    weights = load_file(to / "model.safetensors")
    weights.setdefault("lm_head.weight", model.get_output_embeddings().weight.detach().clone())
    for name, weight in weights.items():
        if name == "lm_head.weight":
            weights[name] = rounded(weight)
        elif weight.dim() == 2 and not any(word in name for word in ("embed", "wte", "wpe")):
            weights[name] = rounded(weight.t()).t().contiguous() if transposed else rounded(weight)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    edit_json(to / "config.json", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=FAMILIES)
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the same with rounded weights."""
    directory = tmp_path_factory.mktemp(request.param)
    family = request.param.partition("-")[0]
    model = make_checkpoint(directory / "given", family, **FAMILIES[request.param])
    save_rounded(directory / "given", directory / "rounded", model, transposed=family == "gpt2")
    return directory / "given", directory / "rounded"


def load(path: Path, **settings: Any) -> LLM:
    return LLM(str(path), **{"dtype": "float32", "num_blocks": 300, "hidden_states": True, **settings})


def first_log_probs(llm: LLM) -> np.ndarray:
    """Of the token after each prompt, [prompts, vocabulary]."""
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=1, logprobs=-1), use_tqdm=False)
    rows = [(output.outputs[0].logprobs or [{}])[0] for output in outputs]
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows])


@pytest.mark.parametrize("impl", ["auto", "transformers"])
def test_log_probs_equal_those_of_transformers_with_the_rounded_weights(paths: tuple[Path, Path], impl: str) -> None:
    given, exact = paths
    llm = load(given, quantization="int8", model_impl=impl)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, logprobs=-1)
    theirs = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float64)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        found = output.outputs[0]
        with torch.inference_mode():
            rows = theirs(torch.tensor([prompt + found.token_ids])).logits[0].log_softmax(-1).numpy()
        for at, entries in enumerate(output.prompt_logprobs or []):
            assert entries is None or abs(entries[prompt[at]].logprob - rows[at - 1, prompt[at]]) < 2e-4
        assert found.logprobs is not None
        for row, entries in zip(rows[len(prompt) - 1 :], found.logprobs, strict=False):
            assert len(entries) == len(row)
            assert max(abs(entry.logprob - row[token]) for token, entry in entries.items()) < 2e-4


def test_without_it_the_same_log_probs_are_off(paths: tuple[Path, Path]) -> None:
    """Else the test above would show nothing."""
    a, b = (first_log_probs(load(paths[0], quantization=quantization)) for quantization in (None, "int8"))
    assert np.abs(a - b).max() > 0.02


def test_every_strategy_gives_what_the_rounded_weights_give(paths: tuple[Path, Path]) -> None:
    """All of them in one batch."""
    found, expected = (load(path, quantization=q) for path, q in zip(paths, ("int8", None), strict=True))
    params = [make(max_tokens=8) for make in STRATEGIES.values()]
    prompts = [PROMPTS[2]] * len(params)
    outputs = [[output.outputs for output in llm.generate(prompts, params, use_tqdm=False)] for llm in (found, expected)]
    assert tokens(outputs[0]) == tokens(outputs[1])
    found.engine.check()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_in_half_precision_log_probs_stay_near(tmp_path: Path, dtype: str, tolerance: float) -> None:
    save_rounded(tmp_path / "given", tmp_path / "rounded", make_checkpoint(tmp_path / "given", dtype=getattr(torch, dtype)))
    found = first_log_probs(load(tmp_path / "given", quantization="int8", dtype=dtype))
    exact = first_log_probs(load(tmp_path / "rounded"))
    assert np.abs(found - exact).mean() < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_and_head_take_a_byte_for_each_weight(tmp_path: Path, dtype: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 320, "tie_word_embeddings": False}
    model = make_checkpoint(tmp_path, "llama", **sizes)
    embedding = 320 * 128
    linear = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2) - embedding
    whole = load(tmp_path, dtype=dtype).engine.info()
    for impl in ("native", "transformers"):
        info = load(tmp_path, dtype=dtype, quantization="int8", model_impl=impl).engine.info()
        assert (info["quantization"], whole["quantization"]) == ("int8", None)
        assert info["parameters"] == whole["parameters"]
        saved = linear * (getattr(torch, dtype).itemsize - 1)
        assert 0.95 * saved < whole["weights_memory"] - info["weights_memory"] < saved


def test_bits_depend_on_the_batch_as_little_as_without_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3")
    if linear_backend(torch.bfloat16, CPU, "int8") == "torch":
        with pytest.raises(ConfigError, match="int8 with bfloat16"):
            load(tmp_path, dtype="bfloat16", quantization="int8", batch_invariant=True)
        return
    params = SamplingParams(seed=1, max_tokens=12, ignore_eos=True, logprobs=-1)

    def bits(prompts: list[list[int]], **settings: Any) -> list[list[dict[int, float]]]:
        llm = load(tmp_path, dtype="bfloat16", quantization="int8", batch_invariant=True, **settings)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [[{i: p.logprob for i, p in at.items()} for at in output.outputs[0].logprobs or []] for output in outputs]

    assert bits(PROMPTS) == [bits([prompt])[0] for prompt in PROMPTS] == bits(PROMPTS, max_num_batched_tokens=24)


def test_what_can_not_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="quantization='int4' is refused: it is one of 'int8'"):
        LLM("demo", quantization="int4")
    make_checkpoint(tmp_path / "looks", "hunyuan_v1_moe", num_experts=4, moe_topk=2, head_dim=16)
    with pytest.raises(ConfigError, match="'int8' is refused: HunYuanMoEV1ForCausalLM looks into its linear layers"):
        load(tmp_path / "looks", quantization="int8")
    make_checkpoint(tmp_path / "quantized")
    edit_json(tmp_path / "quantized" / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match="quantization_config: awq"):
        load(tmp_path / "quantized", quantization="int8")
    monkeypatch.setattr("pagefork.build._device", lambda name: torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="'int8' is refused: it is for a CPU, and this engine runs on cuda"):
        load(tmp_path / "looks", model_impl="transformers", quantization="int8")


def test_the_command_line_has_it_and_takes_it_back(tmp_path: Path) -> None:
    length = ["--temperature", "0", "--max-tokens", "8", PROMPT]
    [flag], [environment] = generated("--quantization", "int8", *length), generated(*length, PAGEFORK_QUANTIZATION="int8")
    assert flag["outputs"] == environment["outputs"]
    file = tmp_path / "settings.toml"
    file.write_text('quantization = "int8"\nnum-blocks = 40\n')
    told = pagefork("info", "--config", str(file), PAGEFORK_NATIVE="off")  # no flag, and read before
    assert "quantization            int8\n" in told.stdout and told.stderr == ""
    assert '"quantization": null' in pagefork("info", "--json", "--config", str(file), "--quantization", "none").stdout
    assert_refused(pagefork("info", "--quantization", "int4"), "int4", "int8", "none")

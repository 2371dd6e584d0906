"""Models that transformers runs over the paged cache get the tokens that transformers gets alone, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_json, make_checkpoint
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from pagefork import LLM, SamplingParams
from pagefork.models.probe import window_of
from pagefork.scheduler.errors import ConfigError, ModelError

LENGTHS = (1, 15, 17, 100)
TOKENS = 12
WINDOW: dict[str, Any] = {"head_dim": 16, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MLA: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 4, "num_key_value_heads": 4, "global_head_dim": 32, "num_global_key_value_heads": 2,
    "attention_k_eq_v": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 331, "num_kv_shared_layers": 2,
    "head_dim": 16, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
SPARSE: dict[str, Any] = {
    "layer_types": ["full_attention", "minimax_m3_sparse"], "head_dim": 16, "index_n_heads": 2, "index_head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "gemma": {"head_dim": 16},
    "gemma2": {**WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": WINDOW,
    "gemma4_text": GEMMA4,
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "olmoe": EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "deepseek_v3": MLA,
    "gpt_oss": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {"logit_scale": 0.3},
    "cohere2": WINDOW,
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": 40},
    "nemotron": {"head_dim": 16},
    "smollm3": {"pad_token_id": 0},
    "exaone4": {**WINDOW, "sliding_window_pattern": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},  # it looks into its linear layers
    "llama": {"hidden_act": "gelu"},  # of a native family, but with a feature that the native decoder lacks
}


def greedy(model: PreTrainedModel, prompt: list[int], count: int = TOKENS) -> list[int]:
    """The tokens that transformers generates."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def ours(llm: LLM, prompts: list[list[int]], count: int = TOKENS) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=count, min_tokens=count)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def load(path: Path, **settings: Any) -> LLM:
    return LLM(str(path), **{"dtype": "float32", "num_blocks": 100, "max_num_seqs": 8, **settings})


def prompts_for(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 331, length).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(tmp_path: Path, family: str) -> None:
    model = make_checkpoint(tmp_path, family, **FAMILIES[family])
    prompts = prompts_for()
    expected = [greedy(model, prompt) for prompt in prompts]
    chunked = load(tmp_path, max_num_batched_tokens=16)
    assert [ours(chunked, [prompt])[0] for prompt in prompts] == expected
    assert ours(chunked, prompts * 2) == expected * 2
    assert ours(load(tmp_path, enable_prefix_caching=False), prompts) == expected
    chunked.engine.check()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("mistral", {"sliding_window": 40}), ("qwen2", {}), ("qwen3", {"tie_word_embeddings": True})],
)
def test_native_and_backed_models_give_the_same_tokens(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    make_checkpoint(tmp_path, family, **overrides)
    native, backed = (load(tmp_path, model_impl=impl) for impl in ("native", "transformers"))
    assert ours(native, prompts_for()) == ours(backed, prompts_for())
    same = ("architecture", "parameters", "vocab_size", "cache_memory", "max_model_len")
    assert {name: native.engine.info()[name] for name in same} == {name: backed.engine.info()[name] for name in same}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_the_check_allows_for_rounding(tmp_path: Path, family: str, dtype: str) -> None:
    model = make_checkpoint(tmp_path, family, **FAMILIES[family], dtype=getattr(torch, dtype))
    llm = load(tmp_path, dtype="auto")
    assert llm.engine.info()["dtype"] == dtype
    [prompt] = prompts_for((40,))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, logprobs=5), use_tqdm=False)
    found = output.outputs[0].logprobs
    assert found is not None
    for token, entry in found[0].items():
        assert entry.logprob == pytest.approx(expected[token].item(), abs=0.3)


@pytest.mark.parametrize(("family", "extra"), [("gpt2", {}), ("opt", FAMILIES["opt"])])
def test_learned_positions_are_used_up_to_the_last(tmp_path: Path, family: str, extra: dict[str, Any]) -> None:
    model = make_checkpoint(tmp_path, family, max_position_embeddings=48, **extra)
    [prompt] = prompts_for((40,))
    llm = load(tmp_path)
    [output] = llm.generate([prompt], SamplingParams(temperature=0, ignore_eos=True, max_tokens=None), use_tqdm=False)
    assert output.outputs[0].token_ids == greedy(model, prompt, 8) and output.outputs[0].finish_reason == "length"
    prompts = prompts_for((40, 38, 36))  # more tokens in a batch than the model has positions
    assert ours(llm, prompts, 8) == [greedy(model, prompt, 8) for prompt in prompts]
    with pytest.raises(ConfigError, match="at most 48 tokens"):
        load(tmp_path, max_model_len=49)


def test_longrope_is_served_up_to_the_length_where_its_frequencies_change(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    model = make_checkpoint(
        tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=64, max_position_embeddings=256, pad_token_id=0
    )
    llm = load(tmp_path)
    assert llm.engine.max_model_len == 64
    [prompt] = prompts_for((50,))
    assert ours(llm, [prompt], 14) == [greedy(model, prompt, 14)]


def test_windows_are_read_off_the_masks() -> None:
    assert window_of(causal_mask_function, 100) is None
    assert window_of(sliding_window_causal_mask_function(7), 100) == 7
    assert window_of(sliding_window_causal_mask_function(1), 100) == 1
    assert window_of(sliding_window_causal_mask_function(100), 100) is None
    none = torch.zeros(1, dtype=torch.int64)
    assert window_of(chunked_causal_mask_function(100, none), 100) is None
    for chunk in (2, 7, 50, 99):
        with pytest.raises(ModelError, match="by chunks"):
            window_of(chunked_causal_mask_function(chunk, none), 100)
    with pytest.raises(ModelError, match="see others than those before them"):
        window_of(bidirectional_mask_function, 100)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("bert", {"is_decoder": False}, "BertLMHeadModel can't be served.*tokens see others than those before"),
        ("roberta", {"is_decoder": True}, "RobertaForCausalLM .*logits are not those that it has with its own attention"),
        ("gptj", {"rotary_dim": 8}, "GPTJForCausalLM .*none of its layers uses the attention interface"),
        ("falcon", {"alibi": True}, "FalconForCausalLM .*none of its layers uses the attention interface"),
        ("doge", {}, "DogeForCausalLM .*changes the attention mask"),
        ("minimax_m3_vl_text", SPARSE, "MiniMaxM3VLForCausalLM .*its attention takes block_indices"),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "MptForCausalLM .*none of its layers uses"),
        ("deepseek_v32", {**MLA, "index_topk": 2048}, "DeepseekV32ForCausalLM .*an indexer selects"),
    ],
)
def test_models_that_attend_in_other_ways_are_refused_by_name(
    tmp_path: Path, family: str, overrides: dict[str, Any], message: str
) -> None:
    make_checkpoint(tmp_path, family, **overrides)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("transformer.h.1.ln_1.bias"), "the checkpoint lacks transformer.h.1.ln_1.bias"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), "weights that the model does not: .*extra.weight"),
        (lambda w: w.update({"transformer.h.1.ln_1.bias": torch.zeros(3)}), r"ln_1.bias is \[3\], not \[64\]"),
        (
            lambda w: w.update({"transformer.h.1.ln_1.bias": torch.zeros(64, dtype=torch.float8_e4m3fn)}),
            "ln_1.bias is stored as F8_E4M3",
        ),
        *(
            (lambda w, name=name: w.update({name: w[name].int()}), f"{name} is stored as I32; weights are floating point")
            for name in ("transformer.h.0.attn.c_attn.bias", "transformer.h.1.mlp.c_fc.weight")
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    make_checkpoint(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    edit(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_fused_weights_in_integers_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "mixtral", **FAMILIES["mixtral"])
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(weights) if ".experts.1." in name)
    save_file(weights | {name: (50 * weights[name]).int()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is stored as I32; weights are floating point"):
        load(tmp_path)


@pytest.mark.parametrize("size", [1, 3])
def test_the_smallest_vocabularies_are_served(tmp_path: Path, size: int) -> None:
    model = make_checkpoint(tmp_path, "gpt2", vocab_size=size, bos_token_id=0, eos_token_id=None)
    assert ours(load(tmp_path), [[0, 0]], 3) == [greedy(model, [0, 0], 3)]


def test_a_model_for_endless_sequences_is_served_up_to_a_bound(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama", max_position_embeddings=2**31 - 1, hidden_act="gelu")
    assert ours(load(tmp_path), [[5, 6]], 3) == [greedy(model, [5, 6], 3)]


def test_masks_that_old_checkpoints_hold_are_ignored(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    [prompt] = prompts_for((9,))
    assert ours(load(tmp_path), [prompt]) == [greedy(model, prompt)]


def test_files_go_through_the_same_checks_as_those_of_native_models(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt2", shard="40KB")
    index = tmp_path / "model.safetensors.index.json"
    owners = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={"transformer.wte.weight": "../other.safetensors"})
    with pytest.raises(ModelError, match=r"a shard is a .safetensors file of the checkpoint's own directory"):
        load(tmp_path)
    edit_json(index, weight_map=owners, metadata=None)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json lacks metadata"):
        load(tmp_path)
    for file in (index, *tmp_path.glob("*.safetensors")):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model.bin: pickle"):
        load(tmp_path)


def test_loading_says_nothing_where_nobody_watches(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path, "gpt2", auto_map={"AutoModelForCausalLM": "modeling.Own"}, tie_word_embeddings=False)
    capfd.readouterr()
    load(tmp_path)
    assert capfd.readouterr() == ("", "")

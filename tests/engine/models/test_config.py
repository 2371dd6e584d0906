"""config.json is understood as transformers understands it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import CONFIGS, SIZES, edit_json, make_checkpoint

from pagefork.models.config import DecoderConfig, parse_config
from pagefork.models.registry import load_outline, resolve_dtype
from pagefork.models.rope import rotary
from pagefork.scheduler.errors import ConfigError, ModelError

LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"]}
QWEN2 = {**SIZES, "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = {**SIZES, "architectures": ["MistralForCausalLM"]}


def saved(path: Path, family: str, **overrides: Any) -> DecoderConfig:
    """What we read of a configuration that transformers wrote."""
    config = CONFIGS[family](**(SIZES | overrides))
    config.architectures = [{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family] + "ForCausalLM"]
    config.save_pretrained(path)
    return parse_config(json.loads((path / "config.json").read_text()))


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """Keys that a saved configuration may lack are filled in as its class does."""
    theirs = CONFIGS[family](**SIZES)
    saved(tmp_path, family)
    edit_json(tmp_path / "config.json", head_dim=None, num_key_value_heads=None, rms_norm_eps=None, tie_word_embeddings=None)
    edit_json(tmp_path / "config.json", num_attention_heads=32, rope_parameters=None)
    ours = parse_config(json.loads((tmp_path / "config.json").read_text()))
    theirs = CONFIGS[family](**json.loads((tmp_path / "config.json").read_text()))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // 32)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_keys_of_before_and_after_transformers_5_say_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    before = parse_config({**LLAMA, **old, "torch_dtype": "bfloat16"})
    after = parse_config({**LLAMA, "rope_parameters": new, "dtype": "bfloat16"})
    assert before == after and after.dtype == "bfloat16"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1,
            "high_freq_factor": 2,
            "original_max_position_embeddings": 90,
        },
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "default"},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_equal_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    from transformers.models.llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = {**SIZES, "head_dim": head_dim, "rope_parameters": {"rope_theta": 50000.0, **rope}}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(raw))))
    inv_freq, scale = rotary(parse_config({**raw, "architectures": ["LlamaForCausalLM"]}).rope, head_dim)
    torch.testing.assert_close(inv_freq, theirs.inv_freq, rtol=1e-5, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling)


def test_the_longest_sequence_is_what_the_positions_serve() -> None:
    def longest(**rope: Any) -> int:
        return parse_config({**LLAMA, "rope_parameters": rope}).max_len

    assert longest(rope_type="default") == 512
    assert longest(rope_type="dynamic", factor=4.0) == 512
    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=512) == 2048
    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=128) == 512


def test_windows_are_per_layer_as_in_transformers(tmp_path: Path) -> None:
    window = {"sliding_window": 100, "max_window_layers": 1}
    assert saved(tmp_path, "mistral", sliding_window=100).windows == (100, 100)
    assert saved(tmp_path, "mistral", sliding_window=None).windows == (None, None)
    assert saved(tmp_path, "mistral", sliding_window=4096).windows == (None, None)  # longer than any sequence
    assert saved(tmp_path, "llama", sliding_window=100).windows == (None, None)
    for family in ("qwen2", "qwen3"):
        assert saved(tmp_path, family, **window).windows == (None, None)
        assert saved(tmp_path, family, **window, use_sliding_window=True).windows == (None, 100)
        kinds = ["sliding_attention", "full_attention"]
        layered = saved(tmp_path, family, **window, use_sliding_window=True, layer_types=kinds)
        assert layered.windows == (100, None) and layered.sliding_window == 100
    assert parse_config({**QWEN2, **window, "use_sliding_window": True}).windows == (None, 100)
    assert parse_config({**QWEN2, **window}).windows == (None, None)


def test_end_tokens_of_both_files_are_merged(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, eos_token_id=[7, 2])
    assert load_outline(tmp_path).eos_token_ids == (7, 2)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[2, 9])
    assert load_outline(tmp_path).eos_token_ids == (7, 2, 9)
    edit_json(tmp_path / "config.json", eos_token_id=None)
    assert load_outline(tmp_path).eos_token_ids == (2, 9)
    (tmp_path / "generation_config.json").unlink()
    assert load_outline(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_is_the_dtype_of_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path, dtype=getattr(torch, dtype))
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", load_outline(tmp_path), cpu) == getattr(torch, dtype)
    edit_json(tmp_path / "config.json", dtype=None)
    assert resolve_dtype("auto", load_outline(tmp_path), cpu) == getattr(torch, dtype)
    assert resolve_dtype("float32", load_outline(tmp_path), cpu) == torch.float32
    with pytest.raises(ConfigError, match=r"float8.*bfloat16"):
        resolve_dtype("float8", load_outline(tmp_path), cpu)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({key: LLAMA[key] for key in LLAMA if key != "hidden_size"}, "hidden_size"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers"),
        ({**LLAMA, "vocab_size": "many"}, "vocab_size"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({**LLAMA, "head_dim": 5}, "head_dim=5 even"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({**LLAMA, "rope_scaling": {"type": "longrope"}}, "rope_type='longrope' is not supported; supported are default, linear"),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, "rope_type='linear' needs factor"),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between kinds of layers"),
        ({**LLAMA, "rope_theta": 0}, "rope_theta"),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1}}, "rope_theta"),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn", "factor": float("inf")}}, "factor"),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "x"}}, "original_max_position"),
        ({**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({**LLAMA, "rope_parameters": {"rope_type": ["x"]}}, r"rope_type=\['x'\] is not supported"),
        (
            {**LLAMA, "rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 2}},
            "low_freq_factor=2.0 must be below high_freq_factor=2.0",
        ),
        ({**LLAMA, "rms_norm_eps": -1}, "rms_norm_eps"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({**LLAMA, "max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({**LLAMA, "max_position_embeddings": 10**30}, "max_position_embeddings"),
        ({**LLAMA, "max_position_embeddings": 2**30, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "4294967296 tokens"),
        ({**QWEN2, "layer_types": ["full_attention", "linear_attention"]}, "layer_types.*linear_attention"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "each of 2 layers"),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 2}, "no sliding_window is in use"),
        ({**MISTRAL, "sliding_window": 9, "layer_types": ["full_attention"] * 2}, "layer_types contradicts"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["NoSuchModel"]}, "architecture NoSuchModel is not supported.*causal language models of transformers"),
        ({**SIZES, "model_type": "llama"}, "none; model_type 'llama'.*of which LlamaForCausalLM, .* run natively"),
        (
            {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "modeling.X"}},
            "Own.*auto_map.*remote code is never run",
        ),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5.* is an encoder-decoder"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, "quantization_config: awq"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3.* is multimodal"),
        ({**LLAMA, "vision_config": {"hidden_size": 8}}, r"multimodal \(vision_config\)"),
        ({**LLAMA, "architectures": ["Llama4ForCausalLM"]}, "Llama4ForCausalLM is not supported: its attention scales"),
        ({**LLAMA, "architectures": ["GPT2LMHeadModel"], "model_type": "llama"}, "names GPT2.*model_type 'llama' is another's"),
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": "x"},
            "GPT2LMHeadModel is refused by transformers",
        ),
        ({"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}, "keeps a state .*linear_attention"),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "Bloom.* states no longest sequence"),
        ({**QWEN2, "eos_token_id": "end"}, "eos_token_id is refused"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 2**40}, "sequences of 1099511627776 tokens"),
        (
            {**LLAMA, "model_type": "llama", "hidden_act": "gelu", "rope_scaling": {"type": "yarn", "factor": float("inf")}},
            "rotary embedding of this LlamaForCausalLM is refused: cannot convert float infinity",
        ),
    ],
)
def test_what_nobody_runs_is_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_outline(tmp_path)


def test_the_native_decoder_takes_what_it_covers_and_transformers_the_rest(tmp_path: Path) -> None:
    def native(impl: str, **changes: Any) -> bool:
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "llama", "dtype": "float32", **changes}))
        return isinstance(load_outline(tmp_path, impl), DecoderConfig)

    partial = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
    assert native("auto") and native("native") and not native("transformers")
    assert native("auto", auto_map={"AutoModelForCausalLM": "modeling.X"})  # transformers has the class itself
    assert not native("auto", **partial) and not native("auto", hidden_act="gelu")
    with pytest.raises(ModelError, match="partial_rotary_factor"):
        native("native", **partial)
    with pytest.raises(ModelError, match=r"model_impl='native' covers LlamaForCausalLM, .*, not GPT2LMHeadModel"):
        native("native", architectures=["GPT2LMHeadModel"], model_type="gpt2")

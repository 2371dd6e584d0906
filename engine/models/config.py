"""What config.json says about a decoder: the keys of older checkpoints as well as those of transformers 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from pagefork.scheduler.errors import ModelError

JsonObject = dict[str, Any]
Size = Annotated[int, Meta(ge=1)]


class Family(Struct, frozen=True):
    """How the checkpoints of one architecture differ; None: config.json says it."""

    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    head_dim: int | None = None  # where config.json has none; None: hidden_size / num_attention_heads
    kv_heads: int | None = None  # likewise; None: as many as attention heads
    window: str = "none"  # which layers have sliding_window: "none", "all", or by "layers" (layer_types)


FAMILIES = {
    "LlamaForCausalLM": Family(mlp_bias=None),
    "MistralForCausalLM": Family(qkv_bias=False, out_bias=False, kv_heads=8, window="all"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, out_bias=False, kv_heads=32, window="layers"),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, kv_heads=32, window="layers"),
}

ROPE_TYPES = {  # and what each of them needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class RopeConfig(Struct, frozen=True):
    """The base of the rotary frequencies and how they are scaled. Names are those of rope_parameters."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelConfig(Struct, frozen=True, kw_only=True):
    """A decoder's sizes and switches; names are those of config.json.

    max_len is the most tokens that a sequence may have. `windows` has one entry per layer: how many tokens a token
    sees, itself included, None for all. `dtype` is that of the checkpoint ("bfloat16", ...), None if not stated.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    max_len: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: RopeConfig
    dtype: str | None
    eos_token_ids: tuple[int, ...]

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of any layer."""
        return min((window for window in self.windows if window is not None), default=None)


class _Raw(Struct):
    """The part of config.json that matters here."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    max_position_embeddings: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: JsonObject | None = None
    rope_parameters: JsonObject | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: float | None = None
    use_sliding_window: bool = False
    sliding_window: Size | None = None
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    eos_token_id: int | list[int] | None = None


class _Generation(Struct):
    eos_token_id: int | list[int] | None = None


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file. Raises ModelError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value


def read_config(directory: Path) -> ModelConfig:
    """The configuration of the checkpoint in a directory. Raises ModelError for what is missing or not supported."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json; a checkpoint is what save_pretrained of transformers writes")
    generation = directory / "generation_config.json"
    return parse_config(read_json(path), read_json(generation) if generation.is_file() else {})


def parse_config(config: JsonObject, generation: JsonObject | None = None) -> ModelConfig:
    """ModelConfig of the contents of config.json and, for its end tokens, generation_config.json.

    Raises ModelError for an architecture, a feature or a value that the decoder does not have, naming it.
    """
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    try:
        raw = msgspec.convert(config, _Raw)
        ends = msgspec.convert(generation or {}, _Generation)
    except msgspec.ValidationError as error:
        raise ModelError(f"the configuration of this {architecture} is refused: {error}") from None
    if raw.hidden_act not in ("silu", "swish"):
        raise ModelError(f"hidden_act={raw.hidden_act!r} is not supported; only 'silu' is")
    heads = raw.num_attention_heads
    kv_heads = raw.num_key_value_heads or family.kv_heads or heads
    head_dim = raw.head_dim or family.head_dim or raw.hidden_size // heads
    if heads % kv_heads or head_dim % 2:
        raise ModelError(
            f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}, head_dim={head_dim} even"
        )
    rope, max_len = _rope(raw)
    qkv_bias = raw.attention_bias if family.qkv_bias is None else family.qkv_bias
    return ModelConfig(
        architecture=architecture,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_hidden_layers=raw.num_hidden_layers,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.rms_norm_eps,
        max_position_embeddings=raw.max_position_embeddings,
        max_len=max_len,
        tie_word_embeddings=raw.tie_word_embeddings,
        qkv_bias=qkv_bias,
        out_bias=qkv_bias if family.out_bias is None else family.out_bias,
        mlp_bias=raw.mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        # A window that no sequence outgrows is none.
        windows=tuple(window if window and window < max_len else None for window in _windows(raw, family)),
        rope=rope,
        dtype=(raw.dtype or raw.torch_dtype or "").removeprefix("torch.") or None,
        eos_token_ids=tuple(dict.fromkeys(_ids(raw.eos_token_id) + _ids(ends.eos_token_id))),
    )


def _architecture(config: JsonObject) -> str:
    listed = config.get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    given = ", ".join(names) or f"(none; model_type {config.get('model_type')!r})"
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(
            f"this checkpoint is quantized (quantization_config: {method}), which is not supported; use the original one"
        )
    if config.get("auto_map"):
        raise ModelError(f"config.json has an auto_map: {given} asks for code of its own, and remote code is never run")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{given} is an encoder-decoder, which is not supported; supported are {', '.join(FAMILIES)}")
    known = [name for name in names if name in FAMILIES]
    if not known:
        raise ModelError(f"the architecture {given} is not supported; supported are {', '.join(FAMILIES)}")
    return known[0]


def _rope(raw: _Raw) -> tuple[RopeConfig, int]:
    """The rotary embedding, and how many positions it serves."""
    given = dict(raw.rope_parameters or raw.rope_scaling or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    if any(isinstance(value, dict) for value in given.values()):
        raise ModelError(f"rope_parameters that differ between kinds of layers ({', '.join(given)}) are not supported")
    if kind not in ROPE_TYPES:
        raise ModelError(f"rope_type={kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if (part := given.get("partial_rotary_factor", raw.partial_rotary_factor)) not in (None, 1.0):
        raise ModelError(f"partial_rotary_factor={part} is not supported; heads rotate as a whole (1.0)")
    given = {name: value for name, value in given.items() if value is not None}
    if missing := [name for name in ROPE_TYPES[kind] if name not in given]:
        raise ModelError(f"rope_type={kind!r} needs {', '.join(missing)} in rope_parameters")
    positions = raw.max_position_embeddings
    original = raw.original_max_position_embeddings or given.get("original_max_position_embeddings") or positions
    given.setdefault("rope_theta", raw.rope_theta or 10000.0)
    given["original_max_position_embeddings"] = original
    if kind == "yarn":
        given.setdefault("factor", positions / original)
    try:
        rope = msgspec.convert(given | {"rope_type": kind}, RopeConfig)
    except msgspec.ValidationError as error:
        raise ModelError(f"rope_parameters are refused: {error}") from None
    # yarn stretches `original` whether or not max_position_embeddings was raised along with it. dynamic would change the
    # frequencies of all earlier positions, whose keys are cached, beyond max_position_embeddings; up to there it is default.
    return rope, max(positions, int(original * rope.factor)) if kind == "yarn" else positions


def _windows(raw: _Raw, family: Family) -> list[int | None]:
    layers = raw.num_hidden_layers
    if family.window == "none":
        return [None] * layers
    kinds = raw.layer_types
    window = raw.sliding_window if family.window == "all" or raw.use_sliding_window else None
    if kinds is None:
        first = 0 if family.window == "all" else raw.max_window_layers
        return [window if layer >= first else None for layer in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ModelError(f"layer_types names full_attention or sliding_attention for each of {layers} layers; given {kinds}")
    if family.window == "all" and window is not None and "full_attention" in kinds:
        raise ModelError("this architecture has sliding_window in all layers, which layer_types contradicts")
    if window is None and "sliding_attention" in kinds:
        raise ModelError(
            "layer_types has sliding_attention layers, but no sliding_window is in use (use_sliding_window, sliding_window)"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else value

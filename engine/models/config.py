"""What config.json says about a decoder: the keys of older checkpoints as well as those of transformers 5."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pagefork.json_file import JsonObject, read_json
from pagefork.scheduler.errors import ModelError

from .rope import RopeConfig, UnsupportedError, parse_rope

Size = Annotated[int, Meta(ge=1, lt=2**31)]
LAYERS = 10_000  # more than any model has; lists per layer are made before anything is compared with the weights


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


class Outline(Struct, frozen=True, kw_only=True):
    """What is known of a model before its weights are read.

    max_len is the most tokens that a sequence may have; `dtype` is that of the checkpoint ("bfloat16", ...), None if
    not stated.
    """

    architecture: str
    max_len: int
    dtype: str | None
    eos_token_ids: tuple[int, ...]


class ModelConfig(Outline, frozen=True, kw_only=True):
    """What cache, batch and sampler need to know of a model; its layers are those that attend, in the order they run.

    `windows` has one entry per layer: how many tokens a token sees, itself included, None for all.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of any layer."""
        return min((window for window in self.windows if window is not None), default=None)


class DecoderConfig(ModelConfig, frozen=True, kw_only=True):
    """Sizes and switches of the native decoder; names are those of config.json."""

    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig


class _Raw(Struct):
    """The part of config.json that matters here."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=LAYERS)]
    num_attention_heads: Size
    max_position_embeddings: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Annotated[float, Meta(ge=0, lt=1)] = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Size | None = None
    max_window_layers: int = 28
    layer_types: list[str] | None = None


class _Ends(Struct):
    eos_token_id: int | list[int] | None = None


def read_configs(directory: Path) -> tuple[JsonObject, JsonObject]:
    """The contents of config.json and of generation_config.json, {} where there is none. Raises ModelError."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json; a checkpoint is what save_pretrained of transformers writes")
    generation = directory / "generation_config.json"
    return read_json(path), read_json(generation) if generation.is_file() else {}


def end_tokens(*configs: JsonObject) -> tuple[int, ...]:
    """eos_token_id of all of them. Raises ModelError where it is no token id or list of them."""
    try:
        found = [msgspec.convert(config, _Ends).eos_token_id for config in configs]
    except msgspec.ValidationError as error:
        raise ModelError(f"eos_token_id is refused: {error}") from None
    return tuple(dict.fromkeys(token for ids in found if ids is not None for token in ([ids] if isinstance(ids, int) else ids)))


def stated_dtype(config: JsonObject) -> str | None:
    """The dtype that config.json states, by either of its names."""
    stated = config.get("dtype") or config.get("torch_dtype")
    return str(stated).removeprefix("torch.") if stated else None


def parse_config(config: JsonObject, generation: JsonObject | None = None) -> DecoderConfig:
    """DecoderConfig of the contents of config.json and, for its end tokens, generation_config.json.

    The first of its architectures is one of FAMILIES. Raises UnsupportedError for a feature that the decoder does
    not have and another ModelError for a value that makes no sense, naming it.
    """
    architecture = config["architectures"][0]
    family = FAMILIES[architecture]
    try:
        raw = msgspec.convert(config, _Raw)
    except msgspec.ValidationError as error:
        raise ModelError(f"the configuration of this {architecture} is refused: {error}") from None
    if raw.hidden_act not in ("silu", "swish"):
        raise UnsupportedError(f"hidden_act={raw.hidden_act!r} is not supported; only 'silu' is")
    heads = raw.num_attention_heads
    kv_heads = raw.num_key_value_heads or family.kv_heads or heads
    head_dim = raw.head_dim or family.head_dim or raw.hidden_size // heads
    if heads % kv_heads or head_dim % 2:
        raise ModelError(
            f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}, head_dim={head_dim} even"
        )
    rope, max_len = parse_rope(config, raw.max_position_embeddings)
    qkv_bias = raw.attention_bias if family.qkv_bias is None else family.qkv_bias
    return DecoderConfig(
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
        dtype=stated_dtype(config),
        eos_token_ids=end_tokens(config, generation or {}),
    )


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
        raise UnsupportedError(
            f"layer_types names full_attention or sliding_attention for each of {layers} layers; given {kinds}"
        )
    if family.window == "all" and window is not None and "full_attention" in kinds:
        raise UnsupportedError("this architecture has sliding_window in all layers, which layer_types contradicts")
    if window is None and "sliding_attention" in kinds:
        raise ModelError(
            "layer_types has sliding_attention layers, but no sliding_window is in use (use_sliding_window, sliding_window)"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]

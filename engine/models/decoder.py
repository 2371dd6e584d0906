"""The one decoder of the Llama-shaped families: Llama, Mistral, Qwen2 and Qwen3 differ in switches of DecoderConfig."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pagefork.batch import Batch
from pagefork.cache import KVCache
from pagefork.kernels.linear import Linear, padded_rows
from pagefork.kernels.paged_attention import paged_attention
from pagefork.kernels.rms_norm import rms_norm
from pagefork.kernels.rope import rope_tables
from pagefork.kernels.rope_write import rope_write
from pagefork.kernels.silu_mul import silu_mul

from .config import DecoderConfig
from .rope import rotary
from .weights import Shape, Weights


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer. Queries, keys and values are one product, as are the gate and the up projection."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None  # [H + KV heads, n]
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class Decoder:
    """A causal language model over the paged cache. `forward` gives the states, `logits` reads tokens off them."""

    def __init__(
        self, config: DecoderConfig, weights: Weights, dtype: torch.dtype, device: torch.device, invariant: bool = False
    ) -> None:
        """Takes its weights one by one. Raises ModelError if names or shapes do not fit, before any is read.

        invariant: as `Linear` has it.
        """
        self.config: DecoderConfig = config
        self.dtype = dtype
        self.device = device
        self.num_parameters = sum(math.prod(shape) for shape in expected_shapes(config).values())
        head = "lm_head.weight"
        expected = expected_shapes(config)
        if config.tie_word_embeddings and head in weights.shapes:
            expected[head] = expected["model.embed_tokens.weight"]
        weights.check(expected, [name for name in weights.shapes if name.endswith("rotary_emb.inv_freq")])

        def take(name: str) -> Tensor:
            return weights.take(name, dtype, device)

        self._embedding = take("model.embed_tokens.weight")
        # Checkpoints with tied embeddings may hold a copy of them as head; where it differs it counts, as in transformers.
        table = take(head) if head in expected else self._embedding
        self._head = Linear(self._embedding if torch.equal(table, self._embedding) else table, invariant=invariant)
        self._norm = take("model.norm.weight")
        self._layers = [_take_layer(layer, config, take, invariant) for layer in range(config.num_hidden_layers)]
        inv_freq, self._rope_scale = rotary(config.rope, config.head_dim)
        self._inv_freq = inv_freq.to(device)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """States [N, hidden] after the last norm, in the model's dtype; writes the batch's keys and values to the cache.

        N counts the padding rows of the batch, whose states mean nothing.
        """
        cache.begin(batch.begun)
        tables = rope_tables(batch.positions, self._inv_freq, self._rope_scale, self.dtype)
        hidden = functional.embedding(batch.tokens, self._embedding)
        eps = self.config.rms_norm_eps
        change: Tensor | None = None
        for index, layer in enumerate(self._layers):
            x = _add_norm(hidden, change, layer.attention_norm, eps)
            change = self._attend(layer, index, x, tables, batch, cache)
            x = rms_norm(change, layer.mlp_norm, eps, hidden)
            change = layer.down(silu_mul(layer.gate_up(x)))
        return _add_norm(hidden, change, self._norm, eps)

    def _attend(
        self, layer: _Layer, index: int, x: Tensor, tables: tuple[Tensor, Tensor], batch: Batch, cache: KVCache
    ) -> Tensor:
        config = self.config
        heads, kv_heads, size = config.num_attention_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(x).view(x.shape[0], heads + 2 * kv_heads, size)
        k_cache, v_cache = cache.k[index], cache.v[index]
        q = rope_write(qkv, layer.qk_norm, config.rms_norm_eps, *tables, k_cache, v_cache, batch.blocks, batch.offsets)
        return layer.out(paged_attention(q, k_cache, v_cache, batch.attention[layer.window], size**-0.5))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [P, vocabulary] of states [P, hidden], in the model's dtype."""
        rows = hidden.shape[0]
        if padding := padded_rows(rows, hidden.device) - rows:
            hidden = functional.pad(hidden, (0, 0, 0, padding))
        return self._head(hidden)[:rows]


def _add_norm(hidden: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(hidden, weight, eps) if change is None else rms_norm(change, weight, eps, hidden)


def _take_layer(index: int, config: DecoderConfig, take: Callable[[str], Tensor], invariant: bool) -> _Layer:
    prefix = f"model.layers.{index}."

    def fused(block: str, parts: tuple[str, ...], bias: bool) -> Linear:
        def joined(kind: str) -> Tensor:
            tensors = [take(f"{prefix}{block}.{part}_proj.{kind}") for part in parts]
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

        return Linear(joined("weight"), joined("bias") if bias else None, invariant)

    def qk_norm() -> Tensor:
        q, k = (take(f"{prefix}self_attn.{name}_norm.weight") for name in "qk")
        return torch.cat((q.expand(config.num_attention_heads, -1), k.expand(config.num_kv_heads, -1)))

    return _Layer(
        attention_norm=take(prefix + "input_layernorm.weight"),
        qkv=fused("self_attn", ("q", "k", "v"), config.qkv_bias),
        qk_norm=qk_norm() if config.qk_norm else None,
        out=fused("self_attn", ("o",), config.out_bias),
        mlp_norm=take(prefix + "post_attention_layernorm.weight"),
        gate_up=fused("mlp", ("gate", "up"), config.mlp_bias),
        down=fused("mlp", ("down",), config.mlp_bias),
        window=config.windows[index],
    )


def expected_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """The weights of a checkpoint by name, as transformers names them."""
    hidden, wide = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q, config.out_bias),
        "mlp.gate_proj": (wide, hidden, config.mlp_bias),
        "mlp.up_proj": (wide, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, wide, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
    return shapes

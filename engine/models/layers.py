"""The weights of the native decoder: their names in a checkpoint, and layers made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagefork.kernels.linear import Linear
from pagefork.kernels.native_forward import DecoderLayer, interleaved

from .config import DecoderConfig
from .weights import Shape, Weights


@dataclass(frozen=True, slots=True)
class Taken:
    """Takes weights out of a checkpoint, each once, and lays them out. native: for `NativeForward`; the rest as in `Linear`."""

    config: DecoderConfig
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    native: bool
    invariant: bool
    quantization: str | None

    def tensor(self, *names: str) -> Tensor:
        """Weights of these names, one below the other."""
        return self.weights.take(names, self.dtype, self.device)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return Linear(weight, bias, self.invariant, self.quantization)

    def layer(self, index: int) -> DecoderLayer:
        config, prefix = self.config, f"model.layers.{index}."

        def projection(names: list[str], bias: bool) -> Linear:
            weight, offset = ([f"{prefix}{name}_proj.{kind}" for name in names] for kind in ("weight", "bias"))
            return self.linear(self.tensor(*weight), self.tensor(*offset) if bias else None)

        def gate_up() -> Linear:
            names = ["mlp.gate", "mlp.up"]
            if not self.native:
                return projection(names, config.mlp_bias)
            kinds = ["weight", "bias"] if config.mlp_bias else ["weight"]
            return self.linear(*(interleaved(*(self.tensor(f"{prefix}{name}_proj.{kind}") for name in names)) for kind in kinds))

        def qk_norm() -> Tensor:
            q, k = (self.tensor(f"{prefix}self_attn.{name}_norm.weight") for name in "qk")
            return torch.cat((q.expand(config.num_attention_heads, -1), k.expand(config.num_kv_heads, -1)))

        return DecoderLayer(
            attention_norm=self.tensor(prefix + "input_layernorm.weight"),
            qkv=projection(["self_attn.q", "self_attn.k", "self_attn.v"], config.qkv_bias),
            qk_norm=qk_norm() if config.qk_norm else None,
            out=projection(["self_attn.o"], config.out_bias),
            mlp_norm=self.tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=gate_up(),
            down=projection(["mlp.down"], config.mlp_bias),
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

"""The one decoder of the Llama-shaped families: Llama, Mistral, Qwen2 and Qwen3 differ in switches of DecoderConfig."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pagefork.batch import Batch, HostBatch
from pagefork.cache import KVCache
from pagefork.kernels._triton import fused_on
from pagefork.kernels.linear import linear_backend, padded_rows
from pagefork.kernels.native_forward import DecoderLayer, NativeForward
from pagefork.kernels.paged_attention import paged_attention
from pagefork.kernels.rms_norm import rms_norm
from pagefork.kernels.rope import rope_tables
from pagefork.kernels.rope_write import rope_write
from pagefork.kernels.silu_mul import silu_mul

from .config import DecoderConfig
from .layers import Taken, expected_shapes
from .rope import rotary
from .weights import Weights


class Decoder:
    """A causal language model over the paged cache. `forward` gives the states, `logits` reads tokens off them."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        invariant: bool = False,
        quantization: str | None = None,
    ) -> None:
        """Takes its weights one by one. Raises ModelError if names or shapes do not fit, before any is read.

        invariant, quantization: as `Linear` has them.
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

        native = linear_backend(dtype, device, quantization) == "native" and not fused_on(device)
        taken = Taken(config, weights, dtype, device, native, invariant, quantization)
        embedding = taken.tensor("model.embed_tokens.weight")
        # Checkpoints with tied embeddings may hold a copy of them as head; where it differs it counts, as in transformers.
        table = taken.tensor(head) if head in expected else embedding
        tied = torch.equal(table, embedding)
        self._head = taken.linear(embedding if tied else table)
        # Natively they are read off the head, where they are those numbers.
        self._embedding = None if native and tied and quantization is None else embedding
        del embedding, table
        self._norm = taken.tensor("model.norm.weight")
        self._layers = [taken.layer(index) for index in range(config.num_hidden_layers)]
        self.weights_memory = sum({id(tensor): tensor.nbytes for tensor in self._held()}.values())
        inv_freq, self._rope_scale = rotary(config.rope, config.head_dim)
        self._inv_freq = inv_freq.to(device)
        self._native = self._made_native() if native else None

    def _made_native(self) -> NativeForward:
        config = self.config
        return NativeForward(
            self._layers,
            self._embedding,
            self._head,
            self._norm,
            self._inv_freq,
            rope_scale=self._rope_scale,
            eps=config.rms_norm_eps,
            heads=config.num_attention_heads,
            kv_heads=config.num_kv_heads,
            wide=config.intermediate_size,
        )

    def _held(self) -> Iterator[Tensor]:
        """All weights as they are laid out, some more than once."""
        yield from (self._norm, *([] if self._embedding is None else [self._embedding]), *self._head.held)
        for layer in self._layers:
            yield from (layer.attention_norm, layer.mlp_norm, *([] if layer.qk_norm is None else [layer.qk_norm]))
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
                yield from linear.held

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """States [N, hidden] after the last norm, in the model's dtype.

        Writes the batch's keys and values to the cache, and its states where the cache has them. N counts the padding
        rows of the batch, whose states mean nothing.
        """
        if self._native is not None:
            assert isinstance(batch, HostBatch)
            rows = batch.rows
            hidden, batch.tokens = self._native(
                rows.slot, rows.start, rows.offset, rows.tokens, batch.tables, batch.last, cache.k, cache.v, cache.hidden
            )
            return hidden
        hidden = self._computed(batch, cache)
        cache.write_hidden(hidden[: len(batch.blocks)], batch.blocks, batch.offsets)
        return hidden

    def _computed(self, batch: Batch, cache: KVCache) -> Tensor:
        """The states, by torch and Triton."""
        assert self._embedding is not None
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
        self, layer: DecoderLayer, index: int, x: Tensor, tables: tuple[Tensor, Tensor], batch: Batch, cache: KVCache
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
        if self._native is not None:
            return self._head(hidden)
        rows = hidden.shape[0]
        if padding := padded_rows(rows, hidden.device) - rows:
            hidden = functional.pad(hidden, (0, 0, 0, padding))
        return self._head(hidden)[:rows]


def _add_norm(hidden: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(hidden, weight, eps) if change is None else rms_norm(change, weight, eps, hidden)

"""Any causal language model of transformers over the paged cache.

transformers runs the layers; its attention interface hands queries, keys and values to us, along with the module that
has them, by which we find the step that is computed. All tokens of a step are one row of one batch for transformers,
told apart by `position_ids` and by our attention alone.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from pagefork.batch import Batch
from pagefork.cache import KVCache
from pagefork.kernels.kv_cache import write_kv
from pagefork.kernels.linear import padded_rows
from pagefork.kernels.paged_attention import paged_attention
from pagefork.scheduler.errors import ConfigError, ModelError

from . import probe
from .check import Expected, check_logits, reference_logits
from .config import ModelConfig, Outline
from .packing import pack, put_back, stand_in, weights_memory
from .pretrained import first_line, quiet

_IMPLEMENTATION = "pagefork"
_PROBED = 4  # tokens of the first run: of one alone less could be told


class Attention(Protocol):
    """What answers the layers of one forward, in the order they run."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """query, key, value: [1, heads, tokens, size] to [1, tokens, heads, value size]."""


class _Step:
    """The attention of one step: writes its keys and values to the cache, layer by layer, and attends."""

    __slots__ = ("_batch", "_cache", "_config", "_layer")

    def __init__(self, config: ModelConfig, batch: Batch, cache: KVCache) -> None:
        self._config, self._batch, self._cache, self._layer = config, batch, cache, 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        config, batch, layer = self._config, self._batch, self._layer
        self._layer += 1
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        written, size = batch.blocks.numel(), query.shape[3]
        k, v = (_fit(x, config.num_kv_heads, config.head_dim)[:written] for x in (key, value))
        write_kv(k.to(k_cache.dtype), v.to(v_cache.dtype), k_cache, v_cache, batch.blocks, batch.offsets)
        q = _fit(query, config.num_attention_heads, config.head_dim).to(k_cache.dtype)
        scale = options.get("scaling")
        out = paged_attention(
            q,
            k_cache,
            v_cache,
            batch.attention[config.windows[layer]],
            size**-0.5 if scale is None else float(scale),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        return out.view(1, *q.shape)[..., : value.shape[3]].to(value.dtype).contiguous()


def _fit(x: Tensor, heads: int, size: int) -> Tensor:
    """[1, h, N, s] to [N, heads, size]: a layer with fewer KV heads or smaller heads than others has them repeated, padded."""
    x = x[0].transpose(0, 1)
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return functional.pad(x, (0, size - x.shape[2])) if x.shape[2] != size else x


class _Relay:
    """Who answers the layers of a model in this moment; all of its modules hold it."""

    attention: Attention


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    relay = cast("_Relay", module.pagefork_relay)
    return relay.attention.attend(query, key, value, attention_mask, options), None


AttentionInterface.register(_IMPLEMENTATION, _attend)
AttentionInterface.register(probe.IMPLEMENTATION, _attend)


class _Given(nn.Module):
    """Stands where the decoder was: what goes in as embeddings comes out as states."""

    def __init__(self, output: type[Any]) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return self._output(last_hidden_state=inputs_embeds)


class BackedModel:
    """A causal language model that transformers loaded, cut in two: the decoder, and what turns its states into logits.

    Raises ModelError, naming the architecture, unless chunks of two sequences computed over a paged cache get the
    logits that the model gives for each sequence as a whole, with its own attention. With `quantization` (as `Linear` has
    it) both are those of the quantized layers, and a model that looks into its linear layers is refused.
    """

    def __init__(self, model: PreTrainedModel, outline: Outline, dtype: torch.dtype, quantization: str | None = None) -> None:
        self.dtype = dtype
        self.device = model.device
        self.num_parameters = sum(weight.numel() for weight in model.parameters())
        self._relay = _Relay()
        try:
            with quiet(), torch.inference_mode():
                self._take(model, outline, quantization)
        except ModelError as error:
            raise ModelError(f"{outline.architecture} can't be served with paged attention: {error}") from None
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ModelError(f"{outline.architecture} can't be served with paged attention; trying raised {reason}") from error

    def _take(self, model: PreTrainedModel, outline: Outline, quantization: str | None) -> None:
        place, decoder = _find_decoder(model)
        for module in decoder.modules():
            module.pagefork_relay = self._relay  # type: ignore[assignment]
        replaced = stand_in(model, self.dtype, self.device, quantization)
        if quantization is not None:
            if not replaced:
                raise ConfigError(f"quantization={quantization!r} is refused: {outline.architecture} has no plain linear layers")
            pack(model, quantization)
        try:
            output, expected = self._observe(model, decoder, outline)
        except AttributeError as error:  # the model looks into its linear layers
            if quantization is not None:
                raise ConfigError(
                    f"quantization={quantization!r} is refused: {outline.architecture} looks into its linear layers ({error})"
                ) from None
            put_back(replaced)
            output, expected = self._observe(model, decoder, outline)
        if quantization is None:
            pack(model, None)
        self.weights_memory = weights_memory(model)
        model.set_attn_implementation(_IMPLEMENTATION)
        model.set_submodule(place, _Given(output))
        self._decoder, self._head = decoder, model
        check_logits(self, expected)

    def _observe(self, model: PreTrainedModel, decoder: nn.Module, outline: Outline) -> tuple[type[Any], Expected]:
        """Sets the config. Returns the type of the decoder's output, and what the model gives by itself."""
        model.set_attn_implementation(probe.IMPLEMENTATION)
        self._relay.attention = listener = probe.Listener(outline.max_len)
        positions = torch.arange(min(_PROBED, outline.max_len), device=self.device)[None]
        output = _decode(decoder, torch.zeros_like(positions), positions)
        window = min((layer.window for layer in listener.layers if layer.window is not None), default=None)
        model.set_attn_implementation("eager")
        embeddings = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
        expected = reference_logits(model, embeddings, outline.max_len, window)
        self.config = _config(outline, listener.layers, expected[0][1].shape[1], output.last_hidden_state.shape[2])
        if self.config.vocab_size > embeddings:
            raise ModelError(f"it has {self.config.vocab_size} logits for {embeddings} embeddings")
        return type(output), expected

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """States [N, hidden] as the decoder leaves them; writes them and the batch's keys and values to the cache."""
        cache.begin(batch.begun)
        self._relay.attention = _Step(self.config, batch, cache)
        states: Tensor = _decode(self._decoder, batch.tokens[None], batch.positions[None]).last_hidden_state[0]
        cache.write_hidden(states[: len(batch.blocks)], batch.blocks, batch.offsets)
        return states

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [P, vocabulary] of states [P, hidden]."""
        rows = hidden.shape[0]
        if padding := padded_rows(rows, hidden.device) - rows:
            hidden = functional.pad(hidden, (0, 0, 0, padding))
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False, return_dict=True).logits
        return logits[0, :rows]


def _find_decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part that turns tokens into states, and its name."""
    for decoder in (model.get_decoder(), model.base_model):
        for name, module in model.named_modules():
            if module is decoder and name and isinstance(module, PreTrainedModel):
                return name, module
    raise ModelError("its decoder is not a part of its own")


def _decode(decoder: nn.Module, tokens: Tensor, positions: Tensor) -> Any:
    return decoder(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True)


def _config(outline: Outline, layers: list[probe.Layer], vocab_size: int, hidden_size: int) -> ModelConfig:
    if not layers:
        raise ModelError("none of its layers uses the attention interface of transformers")
    heads = {layer.heads for layer in layers}
    kv_heads = max(layer.kv_heads for layer in layers)
    if len(heads) > 1 or any(kv_heads % layer.kv_heads for layer in layers):
        raise ModelError(f"its layers have different numbers of heads, {sorted({(x.heads, x.kv_heads) for x in layers})}")
    return ModelConfig(
        architecture=outline.architecture,
        max_len=outline.max_len,
        dtype=outline.dtype,
        eos_token_ids=outline.eos_token_ids,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads.pop(),
        num_kv_heads=kv_heads,
        head_dim=max(max(layer.key_size, layer.value_size) for layer in layers),
        windows=tuple(layer.window for layer in layers),
    )

"""llama.cpp by its low-level batch interface. It has no beam search."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from peers.protocol import TOP_K, TOP_P, Load, Unsupported, converted, versions

BATCH = 2048  # tokens of a decode call
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


class LlamaCpp:
    """A context for the load at hand; flash attention and the batch sizes are those that gave most."""

    def __init__(self, path: Path) -> None:
        self._threads = os.cpu_count() or 1
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"can't load {path}")
        self._context: Any = None
        self._shape: tuple[int, int] | None = None
        self._sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for step in (
            lib.llama_sampler_init_top_k(TOP_K),
            lib.llama_sampler_init_top_p(TOP_P, 1),
            lib.llama_sampler_init_temp(1.0),
            lib.llama_sampler_init_dist(0),
        ):
            lib.llama_sampler_chain_add(self._sampler, step)
        self.settings = f"flash attention, cache in f16, top_k {TOP_K} before top_p, batch {BATCH}"

    def _prepare_context(self, sequences: int, length: int) -> None:
        if self._shape is not None and self._shape[0] == sequences and self._shape[1] >= length:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            lib.llama_free(self._context)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * sequences, sequences
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("can't make a context")
        self._shape = sequences, length

    def prepare(self, load: Load) -> Callable[[], int]:
        if load.beam is not None:
            raise Unsupported("no beam search")
        prompts = load.token_ids()
        self._prepare_context(load.prompts, load.input + max(load.output, 128))

        def run() -> int:
            outputs = [[token] for token in self._prefill(prompts)]
            batch = lib.llama_batch_init(len(prompts), 0, 1)
            for step in range(load.output - 1):
                batch.n_tokens = 0
                for name, tokens in enumerate(outputs):
                    _add(batch, tokens[-1], load.input + step, name, True)
                self._decode(batch)
                for name, tokens in enumerate(outputs):
                    tokens.append(lib.llama_sampler_sample(self._sampler, self._context, name))
            lib.llama_batch_free(batch)
            return sum(map(len, outputs))

        return run

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first token of each."""
        tokens: list[int] = []
        batch = lib.llama_batch_init(BATCH, 0, 1)
        each = max(1, BATCH // len(prompts[0]))
        for first in range(0, len(prompts), each):
            batch.n_tokens = 0
            ends = []
            for name, prompt in enumerate(prompts[first : first + each], first):
                for at, token in enumerate(prompt):
                    _add(batch, token, at, name, at == len(prompt) - 1)
                ends.append(batch.n_tokens - 1)
            self._decode(batch)
            tokens += [lib.llama_sampler_sample(self._sampler, self._context, end) for end in ends]
        lib.llama_batch_free(batch)
        return tokens

    def _decode(self, batch: Any) -> None:
        if code := lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")


def _add(batch: Any, token: int, at: int, name: int, wanted: bool) -> None:
    index = batch.n_tokens
    batch.token[index], batch.pos[index], batch.logits[index] = token, at, wanted
    batch.n_seq_id[index], batch.seq_id[index][0] = 1, name
    batch.n_tokens = index + 1


def convert(model: Path, variant: str, path: Path) -> None:
    """Writes a Llama as GGUF, without a vocabulary: tokens go in and out as ids."""
    import gguf
    from safetensors.torch import load_file

    config, weights = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{variant.upper()}"])
    kind = gguf.GGMLQuantizationType[variant.upper()]

    def add(name: str, weight: np.ndarray[Any, Any]) -> None:
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", weights["model.embed_tokens.weight"].float().numpy())
    add("output_norm.weight", weights["model.norm.weight"].float().numpy())
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in PARTS.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"].float().numpy()
            if ours in ("attn_q", "attn_k"):
                weight = _interleaved(weight, heads if ours == "attn_q" else groups)
            add(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a head in the order in which llama.cpp rotates them: the two halves in turn."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def start(model: Path, variant: str, folder: Path) -> tuple[LlamaCpp, dict[str, str]]:
    path = converted(folder, f"{variant}.gguf", lambda draft: convert(model, variant, draft))
    return LlamaCpp(path), versions("llama-cpp-python")

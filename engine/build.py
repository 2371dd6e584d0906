"""From an EngineConfig to a loaded model, its cache and its runner, in a fixed order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pagefork.scheduler.errors import ConfigError

from .cache import KVCache, hidden_share, num_blocks_for
from .checkpoint import locate
from .config import EngineConfig
from .json_file import read_json
from .kernels.linear import linear_backend
from .models.config import DecoderConfig, Outline
from .models.registry import Model, load_model, load_outline, resolve_dtype
from .runner import ModelRunner
from .tokenizer import Tokenizer

_HIDDEN_SHARE = 0.2  # of the memory of keys and values: models with few KV heads and layers would pay more than they gain
_SMALL_MODEL = 32 << 20  # bytes of weights up to which one thread is as fast as several


class Built(NamedTuple):
    """Everything that outlives the building."""

    path: Path
    model: Model
    cache: KVCache
    runner: ModelRunner
    tokenizer: Tokenizer | None
    max_model_len: int
    generation: dict[str, Any]

    @property
    def first_token(self) -> int | None:
        """What an empty prompt starts from: the beginning-of-text token, else the first end token."""
        known = range(self.model.config.vocab_size)
        given = (self.generation.get("bos_token_id"), *self.model.config.eos_token_ids)
        return next((token for token in given if type(token) is int and token in known), None)

    def info(self, config: EngineConfig) -> dict[str, Any]:
        """Sizes in bytes, except where named otherwise."""
        model, cache, on_cpu = self.model, self.cache, self.cache.device.type == "cpu"
        return {
            "model": config.model,
            "path": str(self.path),
            "architecture": model.config.architecture,
            "parameters": model.num_parameters,
            "vocab_size": model.config.vocab_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(cache.device),
            "cpu_path": linear_backend(model.dtype, cache.device) if on_cpu else None,
            "threads": torch.get_num_threads() if on_cpu else None,
            "weights_memory": model.num_parameters * model.dtype.itemsize,
            "cache_memory": cache.nbytes,
            "hidden_states": cache.hidden is not None,
            "num_blocks": cache.num_blocks - 1,
            "block_size": cache.block_size,
            "batch_invariant": bool(config.batch_invariant),
            "max_model_len": self.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
        }


def build(config: EngineConfig) -> Built:
    """Load and size everything. Raises ModelError or ConfigError before the weights are read, where it can."""
    path = locate(config.model, config.revision)
    outline = load_outline(path, config.model_impl)
    device = _device(config.device)
    dtype = resolve_dtype(config.dtype, outline, device)
    if config.batch_invariant:
        _check_batch_invariant(outline, dtype, device)
    if config.max_model_len is not None and config.max_model_len > outline.max_len:
        raise ConfigError(f"max_model_len={config.max_model_len}: the model was made for at most {outline.max_len} tokens")
    length = config.max_model_len or outline.max_len
    tokenizer = Tokenizer.load(path)
    model = load_model(path, dtype, device, config.model_impl)
    if device.type == "cpu":
        _set_threads(config, model)
    hidden = hidden_share(model.config) <= _HIDDEN_SHARE if config.hidden_states == "auto" else config.hidden_states
    num_blocks = _num_blocks(config, model, length, hidden)
    capacity = (num_blocks - 1) * config.block_size
    if config.max_model_len is not None and capacity < length:
        raise ConfigError(
            f"max_model_len={length} does not fit in the cache of {capacity} tokens: lower it, "
            "or raise num_blocks or kv_cache_memory"
        )
    length = min(length, capacity)
    cache = KVCache(model.config, num_blocks, config.block_size, dtype, device, hidden)
    runner = ModelRunner(model, cache, config.max_num_seqs, length, bool(config.batch_invariant))
    return Built(path, model, cache, runner, tokenizer, length, _generation(path))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no CUDA device here; use 'cpu' or 'auto'")
    return torch.device(name)


def _check_batch_invariant(outline: Outline, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError where the promise can't be kept: it rests on the order in which our CPU kernels add up."""
    if not isinstance(outline, DecoderConfig):
        reason = f"{outline.architecture} runs through transformers"
    elif linear_backend(dtype, device) != "onednn-packed":
        reason = f"{str(dtype).removeprefix('torch.')} on {device} has no packed linear layers here"
    else:
        return
    raise ConfigError(f"batch_invariant=True is for native models in float32 or bfloat16 on a CPU with oneDNN; {reason}")


def _set_threads(config: EngineConfig, model: Model) -> None:
    """Threads wait for each other at every operation; where another process holds a core they wait for its time slice.

    Torch's threads are those of the whole process.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif model.num_parameters * model.dtype.itemsize < _SMALL_MODEL:
        torch.set_num_threads(1)


def _num_blocks(config: EngineConfig, model: Model, length: int, hidden: bool) -> int:
    """Blocks of the cache, the padding sink included; unasked no more than max_num_seqs sequences could fill."""
    if config.num_blocks is not None:
        return config.num_blocks + 1
    blocks = num_blocks_for(config.kv_cache_memory, model.config, config.block_size, model.dtype, model.device, hidden)
    if config.kv_cache_memory is not None:
        return blocks
    return min(blocks, config.max_num_seqs * -(-length // config.block_size) + 1)


def _generation(path: Path) -> dict[str, Any]:
    """generation_config.json over what config.json says of token ids."""
    ids = {"bos_token_id": read_json(path / "config.json").get("bos_token_id")}
    file = path / "generation_config.json"
    return ids | (read_json(file) if file.is_file() else {})

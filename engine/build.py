"""From an EngineConfig to a loaded model, its cache and its runner, in a fixed order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pagefork.scheduler.errors import ConfigError

from .cache import KVCache, hidden_share
from .cache_size import Device, cache_blocks
from .capture import Capture, CudaCapture
from .checkpoint import locate
from .config import EngineConfig
from .json_file import read_json
from .kernels._triton import fused_on
from .kernels.linear import linear_backend
from .kernels.native import native_isa
from .memory import CudaMemory, Memory, check_weights, running_out, weights_advice
from .models.config import DecoderConfig, Outline
from .models.registry import Model, load_model, load_outline, resolve_dtype
from .models.weights import weights_size
from .overlap import overlaps
from .runner import ModelRunner
from .tokenizer import Tokenizer
from .warmup import warm_up

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
    batch_invariant: bool  # whether bits of logits are promised not to depend on the batch
    cuda_graphs: bool  # whether decoding steps are replayed from captured graphs
    overlap: bool  # whether a step is planned while the one before it is computed

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
            "quantization": config.quantization,
            "device": str(cache.device),
            "device_name": None if on_cpu else torch.cuda.get_device_name(cache.device),
            "cpu_path": _cpu_path(model.dtype, config.quantization) if on_cpu else None,
            "threads": torch.get_num_threads() if on_cpu else None,
            "weights_memory": model.weights_memory,
            "cache_memory": cache.nbytes,
            "used_memory": None if on_cpu else torch.cuda.memory_reserved(cache.device),
            "free_memory": None if on_cpu else torch.cuda.mem_get_info(cache.device)[0],
            "hidden_states": cache.hidden is not None,
            "num_blocks": cache.num_blocks - 1,
            "block_size": cache.block_size,
            "batch_invariant": self.batch_invariant,
            "cuda_graphs": self.cuda_graphs,
            "overlap": self.overlap,
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
    if config.quantization is not None and device.type != "cpu":
        raise ConfigError(f"quantization={config.quantization!r} is refused: it is for a CPU, and this engine runs on {device}")
    invariant = _batch_invariant(config, outline, dtype, device)
    if config.max_model_len is not None and config.max_model_len > outline.max_len:
        raise ConfigError(f"max_model_len={config.max_model_len}: the model was made for at most {outline.max_len} tokens")
    graphs = _graphs(config.cuda_graphs, outline, device)
    length = config.max_model_len or outline.max_len
    tokenizer = Tokenizer.load(path)
    memory = _memory(device)
    model = _load(config, path, dtype, device, invariant, memory)
    hidden = hidden_share(model.config) <= _HIDDEN_SHARE if config.hidden_states == "auto" else config.hidden_states

    def make_runner(cache: KVCache, length: int, capture: Capture | None = None) -> ModelRunner:
        return ModelRunner(model, cache, config.max_num_seqs, length, invariant, capture)

    num_blocks = cache_blocks(config, model, length, hidden, None if memory is None else Device(memory, make_runner, graphs))
    capacity = (num_blocks - 1) * config.block_size
    if config.max_model_len is not None and capacity < length:
        raise ConfigError(
            f"max_model_len={length} does not fit in the cache of {capacity} tokens: lower it, "
            "or raise num_blocks or kv_cache_memory"
        )
    length = min(length, capacity)
    cache = KVCache(model.config, num_blocks, config.block_size, dtype, device, hidden)
    if memory is None:
        runner = make_runner(cache, length)
    else:
        with running_out(memory, "a step before the first request", "lower num_blocks or kv_cache_memory"):
            runner = make_runner(cache, length, CudaCapture(device) if graphs else None)
            warm_up(runner, cache, config, length)
    overlap = overlaps(config.overlap, device)
    return Built(path, model, cache, runner, tokenizer, length, _generation(path), invariant, graphs, overlap)


def _load(
    config: EngineConfig, path: Path, dtype: torch.dtype, device: torch.device, invariant: bool, memory: Memory | None
) -> Model:
    """The model, and what it needs of torch's settings."""
    if memory is None:
        model = load_model(path, dtype, device, config.model_impl, invariant, config.quantization)
        _set_threads(config, model)
        return model
    check_weights(weights_size(path, dtype), memory.free(), dtype)
    if dtype == torch.float32:
        _exact_products()
    with running_out(memory, "loading the weights", weights_advice(dtype)):
        return load_model(path, dtype, device, config.model_impl, invariant)


def _device(name: str) -> torch.device:
    """The CPU, or the CUDA device that is the current one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no CUDA device here; use 'cpu' or 'auto'")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _memory(device: torch.device) -> Memory | None:
    """That of a GPU, which weights, steps and cache share; a CPU's is not ours alone."""
    return CudaMemory(device) if device.type == "cuda" else None


def _cpu_path(dtype: torch.dtype, quantization: str | None) -> str:
    """Who computes, and by which instructions."""
    backend = linear_backend(dtype, torch.device("cpu"), quantization)
    return f"native ({native_isa()})" if backend == "native" else backend


def _graphs(asked: bool | None, outline: Outline, device: torch.device) -> bool:
    """Whether decoding steps are captured. Raises ConfigError if that is asked for and can't be."""
    if device.type != "cuda":
        reason = f"graphs need a CUDA device, and this engine runs on the {device.type}"
    elif not isinstance(outline, DecoderConfig):
        reason = f"{outline.architecture} runs through transformers, whose layers may wait for the host"
    elif not fused_on(device):
        reason = "graphs need Triton, which can't be imported here"
    else:
        return asked is not False
    if asked:
        raise ConfigError(f"cuda_graphs=True is refused: {reason}")
    return False


def _exact_products() -> None:
    """float32 is float32: products are not rounded to TF32, should somebody have asked torch for that. Process-wide."""
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        torch.set_float32_matmul_precision("highest")  # `fp32_precision` set, the older switches could not be read any more


def _batch_invariant(config: EngineConfig, outline: Outline, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether no bit depends on the batch; unless asked, where that costs nothing. Raises ConfigError if asked for in vain.

    The promise rests on the order in which our own kernels add up.
    """
    backend, fused = linear_backend(dtype, device, config.quantization), fused_on(device)
    if config.batch_invariant is None:
        return isinstance(outline, DecoderConfig) and backend == "native" and not fused
    if not isinstance(outline, DecoderConfig):
        reason = f"{outline.architecture} runs through transformers"
    elif device.type == "cuda" and not fused:
        reason = "Triton is not installed here"
    elif backend == "torch" and (config.quantization is not None or not fused):
        held = "" if config.quantization is None else f"{config.quantization} with "
        reason = f"{held}{str(dtype).removeprefix('torch.')} on {device} has no packed linear layers here"
    else:
        return config.batch_invariant
    if not config.batch_invariant:
        return False
    raise ConfigError(
        "batch_invariant=True is for native models, on a GPU with Triton, or in float32 or bfloat16 on a CPU with the native "
        f"library or oneDNN; {reason}"
    )


def _set_threads(config: EngineConfig, model: Model) -> None:
    """Threads wait for each other at every operation; where another process holds a core they wait for its time slice.

    Torch's threads are those of the whole process.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif model.weights_memory < _SMALL_MODEL:
        torch.set_num_threads(1)


def _generation(path: Path) -> dict[str, Any]:
    """generation_config.json over what config.json says of token ids."""
    ids = {"bos_token_id": read_json(path / "config.json").get("bos_token_id")}
    file = path / "generation_config.json"
    return ids | (read_json(file) if file.is_file() else {})

"""From a directory to a model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from pagefork.batch import Batch
from pagefork.cache import KVCache
from pagefork.scheduler.errors import ConfigError, ModelError

from .config import DecoderConfig, ModelConfig, Outline
from .decoder import Decoder
from .outline import read_outline
from .weights import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Model(Protocol):
    """What the runner needs of a model."""

    @property
    def config(self) -> ModelConfig:
        """What cache, batch and sampler need to know."""

    dtype: torch.dtype
    device: torch.device
    num_parameters: int
    weights_memory: int  # bytes that the weights take, as they are laid out, each once

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """States [N, hidden] after the last norm; they, where the cache has such, keys and values are in the cache afterwards."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [P, vocabulary] of states [P, hidden], floating point."""


def load_outline(path: str | Path, impl: str = "auto") -> Outline:
    """What config.json says of the checkpoint in a local directory; where it states no dtype, that of its weights.

    A DecoderConfig if the native decoder runs it; `impl` is that of EngineConfig.model_impl. Raises ModelError for what
    is missing, damaged or not supported.
    """
    directory = _directory(path)
    outline = read_outline(directory, impl)
    if outline.dtype is not None:
        return outline
    with Weights(directory) as weights:
        return msgspec.structs.replace(outline, dtype=next(iter(weights.dtypes.values()), "float32"))


def load_model(
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    impl: str = "auto",
    invariant: bool = False,
    quantization: str | None = None,
) -> Model:
    """The model in a local directory of config.json and safetensors, sharded or not.

    Natively weights are read, cast, fused and packed one after another, so they are never held twice. `invariant` and
    `quantization` are as `Linear` has them, of all linear layers and the head. Raises ModelError for a checkpoint that is
    missing, damaged, of an unsupported architecture or format, or whose weights do not fit, and with `invariant` where
    transformers runs it; ConfigError with `quantization` for a model of transformers whose linear layers can't be replaced.
    """
    directory = _directory(path)
    outline = read_outline(directory, impl)
    if isinstance(outline, DecoderConfig):
        with Weights(directory) as weights:
            return Decoder(outline, weights, dtype, device, invariant, quantization)
    if invariant:
        raise ModelError(f"{outline.architecture} runs through transformers, whose layers are not batch invariant")
    from .backed import BackedModel
    from .pretrained import load_pretrained

    return BackedModel(load_pretrained(directory, outline.architecture, dtype, device), outline, dtype, quantization)


def resolve_dtype(name: str, outline: Outline, device: torch.device) -> torch.dtype:
    """The dtype to compute in. "auto" is the checkpoint's, or float32 where that is none of ours or the device lacks it.

    Raises ConfigError for another name, or for bfloat16 on a GPU without it.
    """
    lacking = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        dtype = DTYPES.get(outline.dtype or "", torch.float32)
        return torch.float32 if lacking and dtype == torch.bfloat16 else dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is refused; it is auto, {' or '.join(DTYPES)}")
    if lacking and name == "bfloat16":
        raise ConfigError("dtype='bfloat16' is refused: this GPU does not compute in it; use float16 or float32")
    return DTYPES[name]


def _directory(path: str | Path) -> Path:
    directory = Path(path).expanduser()
    if directory.suffix == ".gguf":
        raise ModelError(f"{directory} is a GGUF file, which is not supported; use the original checkpoint's directory")
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory; a model is a directory with config.json and safetensors files")
    return directory

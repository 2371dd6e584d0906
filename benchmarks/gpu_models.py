"""Checkpoints with random weights in the sizes of known models, and what a step of them has to read and to compute."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pagefork.models.config import DecoderConfig
from pagefork.models.layers import expected_shapes
from pagefork.models.registry import load_outline

QWEN, LLAMA = "Qwen3-0.6B", "Llama-3-8B"
CONFIGS: dict[str, dict[str, Any]] = {
    QWEN: {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    LLAMA: {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}
TINY = {"vocab_size": 331, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SPREAD = 0.02  # standard deviation of the weights
PATTERN = (1 << 24) + 43  # random numbers that are written again and again; odd, so that no two rows of a table are equal
ROOM = 1.1  # times the size of a checkpoint that a folder must have


@contextmanager
def checkpoint(name: str, tiny: bool, dtype: torch.dtype) -> Iterator[Path]:
    """The directory of a checkpoint of these sizes, as `made` has it."""
    with made(CONFIGS[name] | (TINY | TINY_HEADS if tiny else {}), dtype) as directory:
        yield directory


@contextmanager
def made(config: dict[str, Any], dtype: torch.dtype) -> Iterator[Path]:
    """The directory of a checkpoint with this config.json, in memory where there is room for it; it is removed in the end."""
    with tempfile.TemporaryDirectory(dir=_roomy(_size(config, dtype)), prefix="pagefork-") as folder:
        directory = Path(folder)
        stated = config | {"dtype": str(dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(stated))
        _write_weights(directory, dtype)
        yield directory


def outline(directory: Path) -> DecoderConfig:
    """The sizes of a native model. Raises TypeError for others."""
    config = load_outline(directory)
    if not isinstance(config, DecoderConfig):
        raise TypeError(f"{config.architecture} is not native")
    return config


def weight_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What every step reads of the weights: all of them, but of a table of embeddings that is not the head next to nothing."""
    shapes = expected_shapes(config)
    if not config.tie_word_embeddings:
        del shapes["model.embed_tokens.weight"]
    return sum(map(math.prod, shapes.values())) * dtype.itemsize


def token_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token."""
    return 2 * config.num_hidden_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def prompt_flops(config: DecoderConfig, tokens: int) -> int:
    """Multiplications and additions of a prompt: linear layers of all its tokens, causal attention, the head of the last."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    layers = sum(math.prod(shape) for name, shape in expected_shapes(config).items() if name not in tables and len(shape) == 2)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens * (tokens + 1)
    return 2 * layers * tokens + attention + 2 * config.hidden_size * config.vocab_size


def _size(config: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes of the weights, roughly: the tables and the products."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    attention = 2 * (config["num_attention_heads"] + config["num_key_value_heads"]) * head
    layer = hidden * (attention + 3 * wide)
    tables = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * hidden
    weights: int = config["num_hidden_layers"] * layer + tables
    return weights * dtype.itemsize


def _roomy(size: int) -> str:
    """The first folder for temporary files with room for so many bytes. Raises RuntimeError where none has."""
    folders = [folder for folder in ("/dev/shm", tempfile.gettempdir(), str(Path.cwd())) if os.access(folder, os.W_OK)]
    for folder in folders:
        if shutil.disk_usage(folder).free > ROOM * size:
            return folder
    raise RuntimeError(f"a checkpoint of {size / 1e9:.1f} GB does not fit into {' or '.join(folders)}")


def _write_weights(directory: Path, dtype: torch.dtype) -> None:
    """model.safetensors: the length of the header, the header, then the tensors one after another; norms are ones.

    Written by hand, since the library would hold all of them in memory first.
    """
    shapes = expected_shapes(outline(directory))
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes.values()]
    stored = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header, begin = {}, 0
    for (name, shape), size in zip(shapes.items(), sizes, strict=True):
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(0)
    count = min(PATTERN, max(map(math.prod, shapes.values())))
    drawn = (SPREAD * torch.randn(count, generator=generator)).to(dtype)
    pattern = drawn.view(torch.uint8).numpy().data
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape, size in zip(shapes.values(), sizes, strict=True):
            if len(shape) == 1:
                file.write(torch.ones(shape, dtype=dtype).view(torch.uint8).numpy().data)
                continue
            for at in range(0, size, len(pattern)):
                file.write(pattern[: size - at])

"""Checkpoints with random weights, made and saved by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": None,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def make_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard: str | None = None,
    tokenizer: Path | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """Saves a small random model of a family (a model_type of transformers) to a directory and returns it, in eval mode.

    SIZES fit the families of CONFIGS and most others. `overrides` go to its config; `shard` is the largest size of a file
    ("20KB"); `tokenizer` is a directory whose tokenizer is copied. Weights are spread so that attention is far from
    uniform and biases and norms are not neutral.
    """
    set_seed(len(family) + len(overrides))
    settings = SIZES | ({"head_dim": 16} if family == "qwen3" else {}) | overrides
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.25)
            else:
                weight.copy_(0.3 * torch.randn_like(weight) + (1.0 if name.endswith("norm.weight") else 0.0))
    model = model.to(dtype).eval()
    model.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    for name in TOKENIZER if tokenizer else ():
        shutil.copy(Path(tokenizer or "") / name, path)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))

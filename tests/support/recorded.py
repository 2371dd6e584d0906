"""What transformers 4.55.4, the last version with contrastive and group beam search, generates, and with which models.

`tests/data/record_hf4.py` makes `tests/data/hf4.json`; this module is all that it shares with the tests.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

PATH = Path(__file__).parents[1] / "data" / "hf4.json"
CONFIG: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 3},
    "untied": {"tie_word_embeddings": False},
    "small": {"tie_word_embeddings": False, "vocab_size": 23, "hidden_size": 32, "intermediate_size": 48},
}


def fill(model: nn.Module, seed: int = 0) -> None:
    """Sets all weights, from integers, so that they do not depend on any library's way of drawing."""
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            numbers = np.random.RandomState(seed + len(name)).randint(-1024, 1025, weight.shape) / 1024
            scale, middle = (0.5, 0.0) if weight.dim() == 2 else (0.3, 1.0)
            weight.copy_(torch.from_numpy(numbers * scale + middle))


def digest(model: nn.Module) -> str:
    """A checksum of all weights."""
    found = hashlib.sha256()
    for _, weight in sorted(model.named_parameters()):
        found.update(weight.detach().float().numpy().tobytes())
    return found.hexdigest()[:16]


def load() -> dict[str, Any]:
    """The recording."""
    recorded: dict[str, Any] = json.loads(PATH.read_text())
    return recorded

"""A mixed load with preemption for a while: nothing fails, every block comes back, the device's memory does not grow.

SOAK_SECONDS in the environment says how long; without it some steps.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import SIZES, make_checkpoint
from support.devices import engine, soak

VOCAB = SIZES["vocab_size"]


def run(path: Path, device: torch.device, seconds: float) -> None:
    """On a CPU, where kernels are interpreted, with a load that is as small as it gets."""
    small = device.type == "cpu"
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1} if small else {"num_hidden_layers": 4}
    make_checkpoint(path, "qwen3", **sizes)
    load: dict[str, Any] = {"longest": 9, "alive": 5, "new": 4, "steps": 5} if small else {"longest": 200, "alive": 48}
    settings = (
        {"num_blocks": 22, "block_size": 4, "max_num_seqs": 24, "max_num_batched_tokens": 32, "max_model_len": 48}
        if small
        else {"num_blocks": 120, "max_num_seqs": 128, "max_num_batched_tokens": 256}
    )
    with engine(str(path), device=device.type, hidden_states=True, **settings) as llm:
        ended = soak(llm.engine, VOCAB, seconds, **load)
    assert ended.get("length", 0) > 0


def test_a_mixed_load_leaves_nothing_behind(tmp_path: Path, device: torch.device) -> None:
    run(tmp_path, device, float(os.environ.get("SOAK_SECONDS", "0")))


@pytest.mark.long
def test_a_mixed_load_of_minutes_leaves_nothing_behind(tmp_path: Path, device: torch.device) -> None:
    run(tmp_path, device, 180)

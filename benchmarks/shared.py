"""What the scripts have in common: the model that they make, and the facts that a result depends on."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagefork.cli.machine import machine_facts

ROOT = Path(__file__).parents[1]
RANDOM_LLAMA = "random Llama, 134.5 M parameters"


def random_llama() -> str:
    """The directory of a Llama of 134.5 M parameters (vocabulary 49152, tied), random weights in bfloat16, made once."""
    path = ROOT / ".cache/llama-134m"
    if not (path / "model.safetensors").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return str(path)


def facts() -> dict[str, Any]:
    """The machine, the versions, the commit and the command."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return {
        **machine_facts(),
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "commit": commit or None,
    }

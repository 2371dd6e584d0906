"""`generate` of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.protocol import TOP_P, Load, versions
from transformers import AutoModelForCausalLM


class Generate:
    """A model of one dtype."""

    def __init__(self, model: Path, variant: str) -> None:
        self._lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, variant)).eval()
        self._lm.generation_config.eos_token_id, self._lm.generation_config.pad_token_id = None, 0
        self.settings = f"{variant}, sdpa, one batch"

    def prepare(self, load: Load) -> Callable[[], int]:
        ids = torch.tensor(load.token_ids())
        settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": TOP_P, "top_k": 0}
        if load.beam is not None:
            settings = {"do_sample": False, "num_beams": load.beam}

        def run() -> int:
            out = self._lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=load.output, **settings)
            return int(out.shape[0] * (out.shape[1] - ids.shape[1]))

        return run


def start(model: Path, variant: str, folder: Path) -> tuple[Generate, dict[str, str]]:
    return Generate(model, variant), versions("transformers", "torch")

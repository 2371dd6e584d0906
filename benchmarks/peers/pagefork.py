"""Pagefork, in the environment of the script that compares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.protocol import TOP_P, Load, versions

from pagefork import LLM, BeamSearchParams, SamplingParams

CACHE = 2 << 30  # bytes of keys and values
SETTINGS: dict[str, dict[str, Any]] = {"bf16": {"dtype": "bfloat16"}, "int8": {"dtype": "bfloat16", "quantization": "int8"}}


class Pagefork:
    """An engine of one precision."""

    def __init__(self, model: Path, variant: str) -> None:
        self._llm = LLM(str(model), kv_cache_memory=CACHE, **SETTINGS[variant])
        self.settings = ", ".join(f"{name}={value}" for name, value in SETTINGS[variant].items())

    def prepare(self, load: Load) -> Callable[[], int]:
        prompts = load.token_ids()
        params: SamplingParams | BeamSearchParams
        if load.beam is None:
            params = SamplingParams(top_p=TOP_P, max_tokens=load.output, ignore_eos=True)
        else:
            params = BeamSearchParams(beam_width=load.beam, max_tokens=load.output, ignore_eos=True)

        def run() -> int:
            return sum(len(output.outputs[0].token_ids) for output in self._llm.generate(prompts, params, use_tqdm=False))

        return run


def start(model: Path, variant: str, folder: Path) -> tuple[Pagefork, dict[str, str]]:
    return Pagefork(model, variant), versions("pagefork", "torch")

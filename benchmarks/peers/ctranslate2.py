"""CTranslate2's generator."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
from peers.checkpoint import with_tokenizer
from peers.protocol import TOP_P, Load, converted, versions


class CTranslate2:
    """A generator of one compute type."""

    def __init__(self, path: Path, variant: str) -> None:
        known = ctranslate2.get_supported_compute_types("cpu")
        if variant not in known:
            raise ValueError(f"no {variant} on this CPU, only {', '.join(sorted(known))}")
        self._words = json.loads((path / "vocabulary.json").read_text())
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=variant, inter_threads=1, intra_threads=os.cpu_count()
        )
        self.settings = f"compute type {self._generator.compute_type}, one batch"

    def prepare(self, load: Load) -> Callable[[], int]:
        prompts = [[self._words[token] for token in prompt] for prompt in load.token_ids()]
        settings: dict[str, Any] = {"max_length": load.output, "min_length": load.output, "include_prompt_in_result": False}
        if load.beam is None:
            settings |= {"sampling_topp": TOP_P, "sampling_topk": 0}
        else:
            settings |= {"beam_size": load.beam}

        def run() -> int:
            results = self._generator.generate_batch(prompts, **settings)
            return sum(len(result.sequences_ids[0]) for result in results)

        return run


def convert(model: Path, variant: str, folder: Path, path: Path) -> None:
    converter = ctranslate2.converters.TransformersConverter(str(with_tokenizer(model, folder)))
    converter.convert(str(path), quantization=variant)


def start(model: Path, variant: str, folder: Path) -> tuple[CTranslate2, dict[str, str]]:
    path = converted(folder, f"ctranslate2-{variant}", lambda draft: convert(model, variant, folder, draft))
    return CTranslate2(path, variant), versions("ctranslate2")

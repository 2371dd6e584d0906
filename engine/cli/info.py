"""`pagefork info`: what an engine would run with."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from pagefork.cli.flags import Given
from pagefork.cli.generate import DEFAULT_ENGINE
from pagefork.cli.text import one_line
from pagefork.config import EngineConfig


def info(
    *,
    json: Annotated[bool, typer.Option(help="Print one JSON object")] = False,
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Load a model and tell its size, its memory, its cache blocks and the device that runs it."""
    config = EngineConfig(**{**DEFAULT_ENGINE, **engine})
    from pagefork import LLMEngine

    facts = LLMEngine(config).info()
    if json:
        print(json_module.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.replace('_', ' ').ljust(width)}  {one_line(_shown(name, value))}")


def _shown(name: str, value: Any) -> str:
    if name.endswith(("bytes", "memory")) and isinstance(value, int):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

"""The demo model: a small language model of Python source code that travels with the package."""

from __future__ import annotations

from pathlib import Path


def demo_path() -> Path:
    """The directory of the demo checkpoint, in Hugging Face format; `LLM("demo")` loads it."""
    return Path(__file__).parent

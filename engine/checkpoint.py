"""Where a model's files are: the demo, a directory, or the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pagefork.scheduler.errors import ModelError

from .demo import demo_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt"]


def locate(model: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint; hub ids are downloaded to the hub's cache (HF_HUB_OFFLINE is honoured).

    Raises ModelError when there is no such directory or the hub doesn't have it.
    """
    if model == "demo":
        return demo_path()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model {model!r} is a file; give the directory that holds config.json and the safetensors files")
    if not _HUB_ID.fullmatch(model) or model.startswith((".", os.sep)):
        raise ModelError(
            f"model {model!r}: there is no such directory (a hub id reads 'owner/name'; 'demo' is the built-in model)"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {model!r} is no directory, and the hub did not give it: {reason}") from error

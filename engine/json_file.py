"""JSON objects in the files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pagefork.scheduler.errors import ModelError

JsonObject = dict[str, Any]


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file. Raises ModelError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value

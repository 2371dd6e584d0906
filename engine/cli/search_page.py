"""One page, whole in itself, that steps through a search."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
# In JSON these stand inside of strings alone, where an escape means the same; in HTML they could end the element.
_MARKUP = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


def page(document: dict[str, Any]) -> str:
    """`document` in the page, which is ASCII whatever the texts hold. Its policy lets nothing in but its own script and style."""
    template = files("pagefork.cli").joinpath("explain.html").read_text("utf-8")
    sources = {f"{kind}-src": f"'sha256-{_digest(text)}'" for kind, text in _INLINE.findall(template)}
    policy = "; ".join(["default-src 'none'", "base-uri 'none'", "form-action 'none'", *map(" ".join, sources.items())])
    return template.replace("{{policy}}", policy).replace("{{document}}", json.dumps(document).translate(_MARKUP))


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

"""Sphinx settings: guides in Markdown, and the API reference from the docstrings of the installed package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

import pagefork

sys.path.insert(0, str(Path(__file__).parent))
from tables import fields

project = "Pagefork"
author = "the Pagefork authors"
version = release = pagefork.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_parser"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"Pagefork {version}"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True


def _is_struct(kind: str, thing: Any) -> bool:
    return kind in ("class", "exception") and isinstance(thing, type) and issubclass(thing, msgspec.Struct)


def _describe(app: Any, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: line breaks stay; Structs get the table of their fields."""
    paragraphs = "\n".join(lines).strip().split("\n\n")
    lines[:] = [line for paragraph in paragraphs for line in [*_as_rest(paragraph), ""]]
    if _is_struct(kind, thing):
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
        columns = zip(("field", "type", "default", "allowed", "meaning"), *fields(thing), strict=True)
        for row in zip(*(column for column in columns if any(column[1:])), strict=True):
            lines += [f"   {'*' if not index else ' '} - {cell}" for index, cell in enumerate(row)]
        lines.append("")


def _as_rest(paragraph: str) -> list[str]:
    """A paragraph of a docstring; indented ones are formulas and examples."""
    if paragraph.startswith("    "):
        return ["::", "", *paragraph.split("\n")]
    return paragraph.replace("*", r"\*").replace("|", r"\|").replace("`", "``").split("\n")


def _shorten(app: Any, kind: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """The fields of a Struct stand in its table."""
    return ("(...)", None) if _is_struct(kind, thing) else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _describe)
    app.connect("autodoc-process-signature", _shorten)

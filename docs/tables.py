"""Write the tables of parameters in these documents from the Structs themselves: `python docs/tables.py [--check]`.

A table stands between `<!-- table of NAME -->` and `<!-- end -->`, where NAME is PRESETS, LIMITS, a public Struct of pagefork,
MODULE.STRUCT, or wire.STRUCT for a part of a message; with `<!-- table of own NAME -->` the fields that the Struct's base has
too are left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

import pagefork
from pagefork.cli.fields import fields_of
from pagefork.scheduler.params import PRESETS

sys.path.insert(0, str(Path(__file__).parent))
import messages

MARKED = re.compile(r"(<!-- table of (own )?([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str, own: bool = False) -> str:
    if name == "LIMITS":
        return messages.limits()
    if name.startswith("wire."):
        return messages.table(name.removeprefix("wire."))
    if name == "PRESETS":
        settings = {preset: ", ".join(f"{key} {value}" for key, value in fields.items()) for preset, fields in PRESETS.items()}
        rows = ["| name | settings |", "|---|---|"] + [f"| `{preset}` | {shown} |" for preset, shown in settings.items()]
    else:
        rows = ["| name | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        module, _, last = name.rpartition(".")
        struct = getattr(import_module(f"pagefork.{module}") if module else pagefork, last)
        known = {row[0] for row in parameters(struct.__base__)} if own else set()
        rows += [f"| {' | '.join(row)} |" for row in parameters(struct) if row[0] not in known]
    return "\n".join(rows) + "\n"


def parameters(struct: type[msgspec.Struct]) -> Iterator[tuple[str, ...]]:
    """Name, type, default, allowed range and meaning of every field that is not a function."""
    for field in fields_of(struct):
        default = "" if field.default is msgspec.NODEFAULT else f"`{field.default!r}`"
        yield f"`{field.name}`", field.type_name, default, field.bounds, field.description


def fields(struct: type[msgspec.Struct]) -> Iterator[tuple[str, ...]]:
    """The same for every field of any Struct, in reStructuredText."""
    described = {row[0].strip("`"): row for row in parameters(struct)} if hasattr(struct, "check_fields") else {}
    hints = get_type_hints(struct)
    for field in msgspec.structs.fields(struct):
        if field.name in described:
            row = described[field.name]
            yield tuple(cell.replace("`", "``") for cell in row)
        else:
            yield f"``{field.name}``", _shown(hints[field.name]), _default(field), "", ""


def _shown(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
    return re.sub(r"[\w.]+\.(?=\w)", "", text).replace("NoneType", "None").replace("|", r"\|").replace("*", r"\*")


def _default(field: Any) -> str:
    if field.default is not msgspec.NODEFAULT:
        return f"``{field.default!r}``"
    return "" if field.default_factory is msgspec.NODEFAULT else f"``{field.default_factory()!r}``"


def with_tables(text: str) -> str:
    return MARKED.sub(lambda match: match[1] + table(match[3], bool(match[2])) + match[4], text)


def main() -> None:
    stale = []
    for path in sorted(Path(__file__).parent.glob("*.md")):
        old = path.read_text()
        if (new := with_tables(old)) != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run `make tables`")


if __name__ == "__main__":
    main()

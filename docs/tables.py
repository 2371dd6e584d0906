"""Write the tables of parameters in these documents from the Structs themselves: `python docs/tables.py [--check]`.

A table stands between `<!-- table of NAME -->` and `<!-- end -->`, where NAME is PRESETS or a public Struct of pagefork.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec

import pagefork
from pagefork.cli.fields import Field, fields_of
from pagefork.scheduler.params import PRESETS

MARKED = re.compile(r"(<!-- table of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    if name == "PRESETS":
        settings = {preset: ", ".join(f"{key} {value}" for key, value in fields.items()) for preset, fields in PRESETS.items()}
        rows = ["| name | settings |", "|---|---|"] + [f"| `{preset}` | {shown} |" for preset, shown in settings.items()]
    else:
        rows = ["| name | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        rows += [row(field) for field in fields_of(getattr(pagefork, name))]
    return "\n".join(rows) + "\n"


def row(field: Field) -> str:
    default = "" if field.default is msgspec.NODEFAULT else f"`{field.default!r}`"
    return f"| `{field.name}` | {field.type_name} | {default} | {field.bounds} | {field.description} |"


def with_tables(text: str) -> str:
    return MARKED.sub(lambda match: match[1] + table(match[2]) + match[3], text)


def main() -> None:
    stale = []
    for path in sorted(Path(__file__).parent.glob("*.md")):
        old = path.read_text()
        if (new := with_tables(old)) != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run `make docs`")


if __name__ == "__main__":
    main()

"""`pagefork keys`: keys for services that other machines can reach."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pagefork.cli.text import one_line
from pagefork.scheduler.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def new(
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files; made when it is missing")] = Path(),
    name: Annotated[str, typer.Option(help="What the files are called")] = "pagefork",
) -> None:
    """Make a CURVE key pair, for an engine or for a client.

    NAME.key is public: give it to the other side. NAME.key_secret stays where it is, readable by you alone.
    """
    from pagefork.server.keys import new_keys

    if not _NAME.fullmatch(name):
        raise ConfigError(f"name={name!r} is 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', and begins with no '.'")
    public, secret = new_keys(out, name)
    print(f"public key  {one_line(str(public))}")
    print(f"secret key  {one_line(str(secret))}")

"""The `pagefork` command."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from pagefork import __version__
from pagefork.cli.bench import throughput
from pagefork.cli.demo import demo
from pagefork.cli.flags import command
from pagefork.cli.generate import generate
from pagefork.cli.info import info

# Plain help: the tables of rich cut off the longer flags on a terminal of 80 columns.
app = typer.Typer(
    name="pagefork", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
bench = typer.Typer(name="bench", no_args_is_help=True, rich_markup_mode=None, help="Measure the engine on this machine.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pagefork {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")]


@app.callback()
def top(version: Version = False) -> None:
    """An LLM serving engine whose sequences fork."""


command(app)(generate)
command(app)(demo)
command(app)(info)
command(bench)(throughput)
app.add_typer(bench)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model writes what the locale may not know
    app()

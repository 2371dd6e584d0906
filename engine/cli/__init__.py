"""The `pagefork` command."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pagefork import __version__
from pagefork.cli.bench_serve import serve_load
from pagefork.cli.chat import chat
from pagefork.cli.demo import demo
from pagefork.cli.errors import run_app
from pagefork.cli.explain import explain
from pagefork.cli.flags import command
from pagefork.cli.generate import generate
from pagefork.cli.info import info
from pagefork.cli.keys import new
from pagefork.cli.latency import latency
from pagefork.cli.serve import serve
from pagefork.cli.throughput import throughput

# Plain help: the tables of rich cut off the longer flags on a terminal of 80 columns.
app = typer.Typer(
    name="pagefork", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
bench = typer.Typer(name="bench", no_args_is_help=True, rich_markup_mode=None, help="Measure the engine on this machine.")
keys = typer.Typer(name="keys", no_args_is_help=True, rich_markup_mode=None, help="Keys for a service that others can reach.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pagefork {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")]


@app.callback()
def top(version: Version = False) -> None:
    """An LLM serving engine whose sequences fork."""


command(app)(generate)
command(app)(chat)
command(app)(demo)
command(app)(serve)
command(app)(info)
command(app)(explain)
command(bench)(throughput)
command(bench)(latency)
command(bench, "serve")(serve_load)
command(keys)(new)
app.add_typer(bench)
app.add_typer(keys)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The `pagefork` command."""
    # A closed stream is None, which print() takes for standard output; its number would go to the next file that is opened.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (open until the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model writes what the locale may not know
    sys.exit(run_app(app, arguments))

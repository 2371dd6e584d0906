"""What the user can mend becomes one line on stderr and an exit code; other errors keep their traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from pagefork.cli.text import one_line
from pagefork.scheduler.errors import PageforkError

REFUSED, INTERRUPTED = 2, 130  # exit codes, as a shell has them
UsageError: Any = typer.BadParameter.__base__  # typer does not export it by its name


@contextmanager
def reported() -> Iterator[None]:
    """For the work of a command."""
    try:
        yield
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise  # whoever read the output has gone: typer ends without a word
    except OSError as error:
        _leave(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error), REFUSED)
    except PageforkError as error:
        _leave(str(error), REFUSED)


def run_app(app: typer.Typer, arguments: list[str] | None) -> int:
    """Run a command line; the exit code."""
    try:
        return app(arguments, standalone_mode=False) or 0
    except UsageError as error:
        if error.message.startswith("Usage:"):  # a group without a command: its help
            print(error.message, file=sys.stderr)
        else:
            reason = error.format_message()
            place = f"{error.ctx.command_path} --help" if error.ctx else "--help"
            warn(f"{reason[0].lower()}{reason[1:].rstrip('.')}; see `{place}`")
        return REFUSED
    except (KeyboardInterrupt, typer.Abort):  # outside the work of a command
        warn("interrupted")
        return INTERRUPTED


def warn(line: str) -> None:
    """One line of ours on stderr."""
    print(f"pagefork: {one_line(line)}", file=sys.stderr)


def _leave(reason: str, code: int) -> NoReturn:
    warn(reason)
    raise typer.Exit(code) from None

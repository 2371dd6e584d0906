"""`python -m pagefork` is the `pagefork` command, and `main` its console script."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Ctrl-C ends the command in one line even while its modules are being imported."""
    try:
        from pagefork.cli import main as command

        command()
    except KeyboardInterrupt:
        print("pagefork: interrupted", file=sys.stderr)  # noqa: T201 (this is the command)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""A process that its parent configures by standard input and outlives in no case: the child's side.

The first line of standard input is the configuration, in JSON; the end of the input says that the parent is gone. The
first and only line of standard output says that the child is ready, or why it can't be.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from pagefork.scheduler.errors import ConfigError

T = TypeVar("T")

_LONGEST = 1 << 20  # bytes of a configuration
_GOODBYE_SECONDS = 1.0  # what is left of a child after its parent


def hold_standard_streams() -> None:
    """Open those that are closed, so that no socket gets the number that prints and log lines go to."""
    while (found := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(found)


class Parent:
    """The other end of this process's standard input and output.

    Both are taken out of the way: whatever else reads standard input finds its end, whatever prints does so on standard
    error, and no process that this one starts inherits either.
    """

    def __init__(self) -> None:
        self._input, self._output = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)

    def read(self, kind: type[T]) -> T:
        """The configuration. Raises ConfigError for what is none, EOFError when the parent ended before it was whole."""
        line = bytearray()
        while not line.endswith(b"\n"):
            piece = os.read(self._input, 1 << 16)
            if not piece or len(line) > _LONGEST:
                raise EOFError("standard input ended before the line with the configuration did")
            line += piece
        try:
            return msgspec.json.decode(line, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"standard input: {error}") from None

    def tell(self, **facts: Any) -> None:
        """What the parent waits for; once. The output stays open, so that its end is this process's."""
        with suppress(OSError):  # it is gone, which its end of the input says as well
            os.write(self._output, json.dumps(facts).encode() + b"\n")

    def watch(self, gone: Callable[[], object]) -> None:
        """When the parent has died, call `gone`, which must not wait, in another thread; a second later this process ends."""

        def wait() -> None:
            while os.read(self._input, 1 << 16):
                pass
            try:
                gone()
            finally:
                time.sleep(_GOODBYE_SECONDS)
                os._exit(1)

        threading.Thread(target=wait, name="pagefork-parent", daemon=True).start()

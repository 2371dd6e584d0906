"""What wakes the loop of a process: signals and other threads."""

from __future__ import annotations

import signal
import socket
from contextlib import suppress
from types import FrameType

_STOP = (signal.SIGTERM, signal.SIGINT)


class Wakeup:
    """Readable when wake() was called, a signal came, or a child ended. To be made in the main thread.

    `stops` counts the signals that ask this process to stop; `orphaned` says that its parent has died.
    """

    def __init__(self) -> None:
        self.stops = 0
        self.orphaned = False
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        for number in _STOP:
            signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # The handler runs in Python, between two steps of the loop; this ends the loop's sleep.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        """For select and poll."""
        return self._reader.fileno()

    def wake(self) -> None:
        """From any thread; never waits."""
        with suppress(OSError):  # it is full, so the loop is about to wake; or closed, and the loop is over
            self._writer.send(b"\0")

    def orphan(self) -> None:
        """Note that the parent has died; from any thread."""
        self.orphaned = True
        self.wake()

    def clear(self) -> None:
        """Take what made it readable. What is worth waking for is looked at after this."""
        with suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stops += 1

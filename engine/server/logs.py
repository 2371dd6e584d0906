"""Logs as lines on standard error: `2026-11-22T23:17:34.123Z INFO request.finished rid="a" tokens=5`.

A line is one event, and its values are JSON in ASCII, so that no client's id, model's text or error's message can forge a
line or a field. Lines are written by a thread of their own, from a queue with an end: where nobody reads standard
error fast enough, lines are lost and counted, and nobody waits.
"""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import select
import sys
import threading
import time
from typing import Any

logger = logging.getLogger("pagefork")

_QUEUED = 1000  # lines
_LONGEST = 8192  # characters of a value
_FLUSH_SECONDS = 1.0


def log(event: str, /, **fields: object) -> None:
    """Log an event with its fields."""
    logger.info(event, extra={"fields": fields})


def warn(event: str, /, **fields: object) -> None:
    """Log an event that should not have come about."""
    logger.warning(event, extra={"fields": fields})


class Lines:
    """The thread that writes, and what leads to it: the loggers of all libraries, Python's warnings, and sys.stderr.

    `dropped` counts the lines that were lost.
    """

    def __init__(self, level: str, number: int = 2) -> None:
        """number: of the file that lines are written to."""
        self.dropped = 0
        self._number = number
        self._queue: queue.Queue[str | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._run, name="pagefork-log", daemon=True)
        self._thread.start()
        root = logging.getLogger()
        root.handlers[:] = [_Handler(self)]
        root.setLevel(logging.WARNING)
        logger.setLevel(level.upper())
        logging.captureWarnings(True)
        sys.stderr = _Stderr(number)
        sys.excepthook = lambda kind, error, trace: logger.critical("uncaught", exc_info=error)
        threading.excepthook = lambda found: logger.critical("uncaught", exc_info=found.exc_value)

    def put(self, line: str) -> None:
        """Queue a line, or lose it; never waits."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, for at most a second."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
                break
            except queue.Full:
                return
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        told = 0
        while (line := self._queue.get()) is not None:
            self._write(line)
            if self.dropped > told and self._queue.empty():
                told, lost = self.dropped, self.dropped - told
                self._write(_line(time.time(), "WARNING", "log.dropped", {"lines": lost}))

    def _write(self, line: str) -> None:
        left = line.encode("ascii", "backslashreplace") + b"\n"
        try:
            while left:
                try:
                    left = left[os.write(self._number, left) :]
                except BlockingIOError:
                    select.select([], [self._number], [], None)
        except (OSError, ValueError):  # a full disk, a closed pipe, no standard error at all
            self.dropped += 1


class _Handler(logging.Handler):
    """Turns records into lines, in the thread that logs."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put(format_record(record))
        except Exception:  # noqa: BLE001 - a message that can't be made is no reason to end what is logged
            self._lines.dropped += 1


class _Stderr(io.TextIOBase):
    """What libraries and users' functions print on sys.stderr, line by line; of a progress bar its last state."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._rest = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """For processes that inherit it."""
        return self._number

    def write(self, text: str) -> int:
        *lines, rest = (self._rest + text).split("\n")
        self._rest = rest.rpartition("\r")[2][-_LONGEST:]
        for line in lines:
            if shown := line.rpartition("\r")[2].strip():
                warn("stderr", text=shown)
        return len(text)


def format_record(record: logging.LogRecord) -> str:
    """The line of a record. What is logged with a text instead of an event and fields has the event `log`."""
    fields = getattr(record, "fields", None)
    event = record.msg
    if not isinstance(fields, dict):
        event, fields = "log", {"logger": record.name, "message": record.getMessage()}
    if record.exc_info and record.exc_info[1] is not None:
        fields = {**fields, "exception": logging.Formatter().formatException(record.exc_info)}
    return _line(record.created, record.levelname, event, fields)


def _line(created: float, level: str, event: str, fields: dict[str, Any]) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))
    shown = "".join(f" {name}={_value(value)}" for name, value in fields.items())
    return f"{moment}.{int(created % 1 * 1000):03d}Z {level} {event}{shown}"


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    text = str(value)
    return json.dumps(text if len(text) <= _LONGEST else text[:_LONGEST] + "...")

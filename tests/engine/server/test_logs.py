"""Log lines: one each, not to be forged, and nobody waits for who reads them."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from pagefork.server.logs import format_record

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ [a-z_.]+( [a-z_]+=(\"([^\"\\]|\\.)*\"|[\w.+-]+))*")
HOSTILE = 'a" rid="b"\n2026-11-22T00:00:00.000Z INFO forged \x1b[2J\u202e\u2028\x00\ud800é\r\\'


def line(message: Any, *arguments: Any, level: int = logging.INFO, error: BaseException | None = None, **extra: Any) -> str:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("some.library", level, "file.py", 1, message, arguments, exc_info)
    vars(record).update(extra)
    return format_record(record)


def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process that logs."""
    code = f"import logging, sys, os, time, warnings, threading\nfrom pagefork.server.logs import Lines, log, logger\n{code}"
    return subprocess.run([sys.executable, "-P", "-c", code], text=True, timeout=60, **options)


def test_a_line_has_a_time_a_level_an_event_and_fields() -> None:
    text = line("request.finished", fields={"rid": "a", "tokens": 5, "share": 0.5, "error": None, "late": False})
    assert re.fullmatch(
        r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO request.finished rid="a" tokens=5 share=0.5 error=null late=false', text
    )


@pytest.mark.parametrize(
    "forged",
    [
        line("event", fields={"rid": HOSTILE}),
        line("event", fields={"list": [HOSTILE], "error": ValueError(HOSTILE)}),
        line("a message: %s", HOSTILE, level=logging.WARNING),
        line("failed", fields={}, error=ValueError(HOSTILE)),
    ],
)
def test_no_text_can_forge_a_line_or_a_field(forged: str) -> None:
    assert LINE.fullmatch(forged)
    assert forged.isascii() and forged.isprintable()
    values = re.findall(r"(?<= )[a-z_]+=(\"(?:[^\"\\]|\\.)*\")", forged)
    assert any("forged" in json.loads(value) for value in values)


def test_a_value_that_is_too_long_is_cut() -> None:
    assert len(line("event", fields={"text": "x" * 10**6})) < 10_000


def test_everything_that_a_library_says_goes_the_same_way() -> None:
    done = run(
        """
lines = Lines("info")
log("an.event", text="a\\nb")
logging.getLogger("library").warning("a\\n%s", "warning")
logging.getLogger("library").info("not told")
warnings.warn("deprecated")
print("printed\\nand printed", file=sys.stderr)
sys.stderr.write("0%\\r50%\\r100%\\n")
logging.getLogger("library").warning("%d", "not a number")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
try:
    raise ValueError("with a traceback")
except ValueError:
    logger.exception("failed")
lines.close()
print(lines.dropped)
""",
        capture_output=True,
    )
    told = done.stderr.splitlines()
    assert [text for text in told if not LINE.fullmatch(text)] == []
    lost = [text for text in told if "log.dropped lines=1" in text]  # what could not be formatted
    assert len(lost) == 1
    for text, part in zip(
        [text for text in told if text not in lost],
        [
            "an.event",
            r'"a\nwarning"',
            "deprecated",
            '"printed"',
            '"and printed"',
            '"100%"',
            "ZeroDivisionError",
            "with a traceback",
        ],
        strict=True,
    ):
        assert part in text
    assert done.stdout == "1\n"


def test_who_logs_never_waits_for_who_reads_and_hears_what_was_lost() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    code = """
lines = Lines("info")
began = time.monotonic()
for number in range(100_000):
    log("an.event", number=number)
took = time.monotonic() - began
print(took, flush=True)
sys.stdin.readline()
while not lines._queue.empty():
    time.sleep(0.01)
time.sleep(0.2)
log("the.last", dropped=lines.dropped)
lines.close()
"""
    code = f"import logging, sys, os, time\nfrom pagefork.server.logs import Lines, log\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writer, text=True
    )
    os.close(writer)
    assert process.stdout is not None and process.stdin is not None
    assert float(process.stdout.readline()) < 20.0  # nobody reads, and it comes to an end
    process.stdin.write("\n")
    process.stdin.flush()
    with os.fdopen(reader) as opened:
        told = opened.read().splitlines()
    process.stdin.close()
    assert process.wait(30) == 0
    process.stdout.close()
    lost = sum(int(found[1]) for text in told if (found := re.search(r"log\.dropped lines=(\d+)", text)))
    assert "the.last" in told[-1] and f"dropped={lost}" in told[-1]
    assert lost + sum("an.event" in text for text in told) == 100_000


@pytest.mark.parametrize("stderr", ["/dev/full", "closed"])
def test_a_full_disk_and_a_closed_standard_error_end_nothing(stderr: str) -> None:
    code = "lines = Lines('info')\nfor _ in range(10): log('an.event')\nlines.close()\nprint(lines.dropped)"
    with open("/dev/full", "w") as full:  # noqa: PTH123 (a device)
        options: dict[str, Any] = {"stderr": full} if stderr == "/dev/full" else {"preexec_fn": lambda: os.close(2)}
        began = time.monotonic()
        done = run(code, stdout=subprocess.PIPE, **options)
    assert (done.returncode, done.stdout) == (0, "10\n")
    assert time.monotonic() - began < 20.0

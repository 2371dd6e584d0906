"""Text of unknown origin: decoded, and made safe for a terminal and for a log line."""

from __future__ import annotations

import json
import re

from pagefork.scheduler.errors import InvalidRequestError

# Control characters could move the cursor, retitle the window or forge a line; bidirectional overrides reorder what is shown.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_BREAK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def decoded(data: bytes, source: str) -> str:
    """Text that must be UTF-8. Raises InvalidRequestError, which names the source."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def printable(text: str) -> str:
    """Text without the characters that a terminal obeys; line feeds and tabs stay."""
    return _CONTROL.sub("", text)


def one_line(text: str) -> str:
    """Text on a single line, safe for a terminal."""
    return printable(_BREAK.sub(" ", text)).strip()


def label(text: str, width: int = 60) -> str:
    """A quoted excerpt on one line, at most `width` characters."""
    quoted = json.dumps(text, ensure_ascii=False)
    return printable(quoted if len(quoted) <= width else quoted[: width - 1] + "…")

"""What a terminal shows of text of unknown origin."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagefork import PageforkError, RequestMetrics, RequestOutput
from pagefork.cli.text import one_line, printable
from pagefork.cli.view import JsonLines


@given(st.text())
def test_a_terminal_gets_no_control_character(text: str) -> None:
    shown = printable(text)
    assert {c for c in shown if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}
    assert [c for c in text if unicodedata.category(c) != "Cc" and unicodedata.bidirectional(c) not in BIDI] == [
        c for c in shown if c not in "\n\t"
    ]
    assert len(one_line(text).splitlines()) <= 1


BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
SHOW = """
from pagefork.cli.view import choose_view
from pagefork.outputs import CompletionOutput, RequestMetrics, RequestOutput
text = "safe \\x1b]0;title\\x07 \\x9b2J [bold]plain[/bold] \\u202e end"
view = choose_view(["\\x1b[2J"] * {prompts}, 1)
with view:
    for index in range({prompts}):
        done = CompletionOutput(index=0, text=text, token_ids=[1], finish_reason="length")
        facts = dict(request_id="0", prompt="", prompt_token_ids=[], finished=True, metrics=RequestMetrics(arrival_time=0.0))
        view.show(index, RequestOutput(outputs=[done], **facts))
"""


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_terminal_shows_model_text_without_its_escapes_and_its_markup_as_text(prompts: int) -> None:
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    with subprocess.Popen([sys.executable, "-P", "-c", SHOW.format(prompts=prompts)], stdout=there, env=environment) as process:
        os.close(there)
        shown = b""
        while chunk := read(here):
            shown += chunk
    os.close(here)
    assert process.returncode == 0
    assert shown.count(b"safe ]0;title 2J [bold]plain[/bold]  end") == prompts
    assert not any(escape in shown for escape in (b"\x1b]0", b"\x07", "\x9b".encode(), "\u202e".encode(), b"\x1b[2J"))


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux ends a terminal whose other side is closed
        return b""


def test_json_carries_the_message_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = RequestMetrics(arrival_time=0.0)
    error = PageforkError("no block left")
    with JsonLines() as view:
        output = RequestOutput(
            request_id="0", prompt="", prompt_token_ids=[], outputs=[], finished=True, metrics=metrics, error=error
        )
        view.show(0, output)
    assert json.loads(capsys.readouterr().out)["error"] == "no block left"

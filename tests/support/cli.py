"""The `pagefork` command: in this process, where it starts a hundred times faster, and as a process of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pagefork.cli import main
from pagefork.demo import demo_path

COMMAND = [sys.executable, "-P", "-m", "pagefork"]
# The commands compute little, and beside other tests waiting for a second core would cost more than it gives.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PROMPT = "def read_lines(path):\n"
GREEDY = ["--temperature", "0", "--max-tokens", "16"]


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


def pagefork(*arguments: str, stdin: str | bytes = "", locale: str = "utf-8", **environment: str) -> Done:
    """Runs a command line in this process, through the function that the console script calls; locale: what stdin is read in."""
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=locale))
        patch.setattr(sys, "argv", ["pagefork", *arguments])
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return Done(int(ended.value.code or 0), *texts)


def generated(*arguments: str, stdin: str = "", **environment: str) -> list[dict[str, Any]]:
    """What `generate --json` prints."""
    done = pagefork("generate", "--json", *arguments, stdin=stdin, **environment)
    assert done.code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.split("\n")[:-1]]


def demo_with_template(path: Path, template: str) -> Path:
    """The demo checkpoint with a chat template."""
    shutil.copytree(demo_path(), path, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (path / "chat_template.jinja").write_text(template)
    return path


def assert_refused(done: Done, *named: str) -> None:
    """One line on stderr that names the cause, and nothing else."""
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("pagefork: ")
    assert done.stderr.count("\n") == 1
    assert [name for name in named if name not in done.stderr] == [], done.stderr

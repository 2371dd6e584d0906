"""The Triton kernels in Triton's interpreter: processes of their own, since a kernel is interpreted from its definition on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.glob("*/fused/test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_the_kernels_pass_in_the_interpreter(name: str) -> None:
    """pytest over one file of a folder called "fused"."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS / name)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

"""The native library: what it is built of, and what happens where it is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pagefork.kernels.native import library, native_isa

ROOT = Path(__file__).parents[2]


def isa(choice: str) -> str:
    """What another process computes with."""
    code = "from pagefork.kernels.native import native_isa; print(native_isa())"
    environment = {**os.environ, "PAGEFORK_NATIVE": choice, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_every_source_is_built_and_goes_into_the_source_distribution() -> None:
    (built,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    files = {f"kernels/csrc/{path.name}" for path in (ROOT / "kernels/csrc").iterdir() if path.suffix in {".cpp", ".h", ".inc"}}
    assert {*built["sources"], *built["depends"]} == files
    assert built["optional"], "without a compiler the package is installed all the same"


def test_the_library_can_be_switched_off() -> None:
    assert isa("off") == "None"


@pytest.mark.skipif(library() is None, reason="the native library is not built here")
def test_an_instruction_set_that_the_machine_lacks_is_passed_over_for_its_best() -> None:
    assert isa("scalar") == "scalar"
    assert isa("neon" if native_isa() != "neon" else "avx2") == isa("")

"""The native library: what it is built of, and what happens where it is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pagefork.kernels.native import _built, library, native_isa

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


def test_a_library_older_than_its_sources_is_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _built(tmp_path) is None
    source, built, later = (tmp_path / name for name in ("matmul.inc", "_native.abi3.so", "_native.so"))
    for age, path in ((30, source), (20, built), (10, later)):
        path.touch()
        os.utime(path, (2e9 - age, 2e9 - age))
    assert _built(tmp_path) == later
    os.utime(source, (2e9, 2e9))
    assert _built(tmp_path) is None
    assert "older than its sources" in caplog.text


def test_the_library_can_be_switched_off() -> None:
    assert isa("off") == "None"


@pytest.mark.skipif(library() is None, reason="the native library is not built here")
def test_an_instruction_set_that_the_machine_lacks_is_passed_over_for_its_best() -> None:
    assert isa("scalar") == "scalar"
    assert isa("neon" if native_isa() != "neon" else "avx2") == isa("")

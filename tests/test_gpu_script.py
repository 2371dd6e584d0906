"""benchmarks/gpu.py: a part that fails or hangs stops no other, and what is missing is said in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
from gpu import Part  # noqa: E402

SLEEPS = "import time; time.sleep(60)"
WRITES = "import json, sys, pathlib; pathlib.Path(sys.argv[1], 'kernel_b.json').write_text(json.dumps({'op': 'b', 'cases': []}))"
FAILS = "import sys; print('it broke'); sys.exit(5)"


def test_no_part_stops_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {"fails": FAILS, "hangs": SLEEPS, "writes": WRITES}
    monkeypatch.setattr(gpu, "command", lambda part, _, folder: [sys.executable, "-c", codes[part.name], str(folder)])
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    start = time.monotonic()
    parts = [Part("fails", 0.9), Part("hangs", 0.1), Part("writes", 0.1)]
    outcomes = gpu.run_all(parts, 20.0, tmp_path, dict(os.environ))
    assert time.monotonic() - start < 20
    assert [outcome.status for outcome in outcomes] == [5, None, 0]
    assert "failed (5)" in str(outcomes[0]) and "it broke" in str(outcomes[0]) and "out of time" in str(outcomes[1])
    gpu.write(tmp_path / "out", gpu.collected(tmp_path, outcomes), outcomes)
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["status"] for part in result["parts"]] == [5, None, 0] and result["results"] == [{"op": "b", "cases": []}]
    assert "it broke" in (tmp_path / "out" / "gpu.log").read_text()


def test_what_has_no_time_left_does_not_begin(tmp_path: Path) -> None:
    [outcome] = gpu.run_all([Part("sample", 1.0)], gpu.LEAST / 2, tmp_path, {})
    assert outcome.status is None and outcome.said == "never began"


@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_every_part_is_there(part: Part, tmp_path: Path) -> None:
    given = gpu.command(part, 100.0, tmp_path)
    paths = [Path(word) for word in given if word.startswith(str(ROOT)) and word != sys.executable]
    assert paths and all(path.exists() for path in paths)


def test_the_package_is_laid_out_by_links(tmp_path: Path) -> None:
    gpu.lay_out(tmp_path)
    code = "import pagefork.kernels.sample, pagefork.scheduler.plan; print(pagefork.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "pagefork" / "__init__.py"), done.stderr


@pytest.mark.parametrize("script", ["gpu.py", "gpu_engine.py", "kernels/sample.py"])
def test_without_a_device_a_line_says_so(script: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script)], env=environment, capture_output=True, text=True)
    assert done.returncode == gpu.NO_DEVICE and "CUDA device" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "NEEDED", {**gpu.NEEDED, "not_there": "not-there"})
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == gpu.NO_PACKAGE and "not-there" in capsys.readouterr().err

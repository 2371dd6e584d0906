"""What a first run on a machine with a GPU must find in order, as far as it shows without one.

Such a machine has torch, Triton, transformers, pytest, msgspec and pyzmq with what they need, and nothing else.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402

LACKS = """
from importlib.machinery import PathFinder

_find = PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {lacking} else _find(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""


def needed() -> set[str]:
    """The distributions that `make gpu` asks for, and those that these require."""
    found: set[str] = set()
    asked = [*gpu.NEEDED.values(), "numpy", "setuptools"]
    while asked:
        name = _plain(asked.pop())
        if name not in found:
            try:
                required = distribution(name).requires or []
            except PackageNotFoundError:  # of another platform
                continue
            found.add(name)
            asked += [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that can import nothing else; `pagefork` is laid out by links."""
    folder, has = tmp_path_factory.mktemp("machine"), needed()
    lacking = {module for module, names in packages_distributions().items() if not has & {_plain(name) for name in names}}
    assert "pagefork" in lacking and not lacking & {"torch", "transformers", "safetensors", "tokenizers"}
    (folder / "sitecustomize.py").write_text(LACKS.format(lacking=sorted(lacking - {"pagefork"})))
    gpu.lay_out(folder)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # those that are installed here would not be there


def run(machine: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=machine, capture_output=True, text=True)


def test_what_is_not_there_is_not_found(machine: dict[str, str]) -> None:
    """Else the tests below would show nothing."""
    assert "No module named 'hypothesis'" in run(machine, "-c", "import hypothesis").stderr


def test_the_tests_for_a_gpu_are_found(machine: dict[str, str], tmp_path: Path) -> None:
    """All but one file by the part of the tests, that one by the soak. One process collects for both, to load torch once."""
    parts = [part for part in gpu.PARTS if part.script is None]
    commands = [[*_alone(gpu.command(part, 100.0, tmp_path)), "--collect-only"] for part in parts]
    code = f"import pytest\nfor command in {commands!r}:\n print('status', int(pytest.main(command)))"
    done = run(machine, "-c", code)
    collected = [re.findall(r"^(tests/\S+?\.py)::", said, re.MULTILINE) for said in done.stdout.split("status 0\n")]
    assert len(collected) == len(parts) + 1, done.stdout[-3000:] + done.stderr[-3000:]
    found = {part.name: set(files) for part, files in zip(parts, collected, strict=False)}
    soak = {gpu.SOAK.relative_to(ROOT).as_posix()}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*/fused/test_*.py")}
    assert found == {"tests": files - soak, "soak": soak}


def _alone(command: list[str]) -> list[str]:
    """What follows `python -m pytest`, without the number of processes."""
    assert command[1:3] == ["-m", "pytest"]
    arguments = command[3:]
    if "-n" in arguments:
        at = arguments.index("-n")
        del arguments[at : at + 2]
    return arguments


def test_the_benchmarks_can_be_started(machine: dict[str, str]) -> None:
    """One process imports them all, as each is far quicker than torch."""
    folders = sorted({str((ROOT / "benchmarks" / part.script).parent) for part in gpu.PARTS if part.script})
    modules = [Path(part.script).stem for part in gpu.PARTS if part.script]
    done = run(machine, "-c", f"import sys; sys.path[:0] = {folders}\nimport {', '.join(modules)}, chart")
    assert done.returncode == 0, done.stderr


def test_all_parts_fit_into_the_time_of_a_run() -> None:
    """Each has its share even if all before it take all of theirs."""
    left, seconds = 460.0, {}
    for part in gpu.PARTS:
        share = 1.0 if part is gpu.PARTS[-1] else part.share
        seconds[part.name] = left * share
        left -= seconds[part.name]
    assert abs(left) < 1e-6 and min(seconds.values()) > gpu.GRACE
    assert seconds["gpu_engine"] >= 0.38 * 460 and seconds["soak"] > gpu.SOAK_SECONDS + 10
    assert sum(seconds.values()) + gpu.DYING * len(gpu.PARTS) < 8 * 60 + 40

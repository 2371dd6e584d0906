"""The environments that peers run in, each made from benchmarks/peers/requirements-NAME.txt.

requirements-NAME-alone.txt, where there is one, lists packages that are installed after that without their dependencies.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

from shared import ROOT

CACHE = ROOT / ".cache/peers"
REQUIREMENTS = ROOT / "benchmarks/peers"
SECONDS = 3600  # for an installation; some packages are built from source


class Missing(Exception):
    """An environment can't be made; the message says why."""


def environment(name: str, folder: Path | None = None) -> Path:
    """The environment's folder: .cache/peers/NAME, made anew where its requirements changed, or `folder` as it is.

    Raises Missing.
    """
    if folder is not None:
        if not (folder / "bin/python").exists():
            raise Missing(f"no bin/python in {folder}")
        return folder
    files = [REQUIREMENTS / f"requirements-{name}.txt", REQUIREMENTS / f"requirements-{name}-alone.txt"]
    steps = [["-r", str(files[0])]]
    if files[1].exists():
        steps.append(["--no-deps", "-r", str(files[1])])
    text = sys.version + "".join(file.read_text() for file in files[: len(steps)])
    folder, wanted = CACHE / name, hashlib.sha256(text.encode()).hexdigest()
    stamp = folder / ".installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {name} into {folder.relative_to(ROOT)}", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        for step in steps:
            _pip(folder, step)
        stamp.write_text(wanted)
    return folder


def _pip(folder: Path, arguments: list[str]) -> None:
    command = [str(folder / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.lower().startswith("error")]
        raise Missing("pip: " + (" ".join(lines) or error.stderr[-300:])[:300]) from error
    except subprocess.TimeoutExpired as error:
        raise Missing(f"pip took more than {SECONDS} s") from error

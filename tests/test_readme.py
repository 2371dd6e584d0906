"""What the pages tell a reader to type works as typed, but for the port and the folder of the sockets."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TYPED = "127.0.0.1:8000"


class Service(NamedTuple):
    """What the service of README listens on, and the environment of its users."""

    address: str
    environment: dict[str, str]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(beginning: str) -> list[str]:
    """Lines of README that a reader types into a shell."""
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(beginning)]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """What README has started, with any free port."""
    [typed] = commands("pagefork serve")
    assert TYPED in typed
    with tempfile.TemporaryDirectory(prefix="pf-") as folder:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PAGEFORK_RUNTIME_DIR": f"{folder}/run", "PYTHONSAFEPATH": "1", "PATH": programs}
        command = f"exec {typed.partition('#')[0].replace(TYPED, '127.0.0.1:0')}"
        with (
            (Path(folder) / "log").open("w") as log,
            subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
        ):
            assert process.stdout is not None
            said = ""
            while "OpenAI API" not in said:
                line = process.stdout.readline()
                assert line, (Path(folder) / "log").read_text()
                said += line
            [address] = re.findall(r"http://(127\.0\.0\.1:\d+)", said)
            yield Service(address, environment)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def run(command: list[str], service: Service, cwd: Path) -> str:
    """What a command prints, with the port that is served."""
    typed = [part.replace(TYPED, service.address) for part in command]
    done = subprocess.run(typed, cwd=cwd, env=service.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/search.md", "docs/serving.md"])
def test_the_python_examples_of_a_page_run(page: str, tmp_path: Path, service: Service) -> None:
    examples = blocks(page, "python")
    assert examples
    for example in examples:
        assert run([sys.executable, "-c", example], service, tmp_path).strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_requests_of_readme_are_answered(tmp_path: Path, service: Service) -> None:
    completion, metrics = [run(["bash", "-c", command], service, tmp_path) for command in commands("curl")]
    assert '"text_completion"' in completion and "pagefork:num_requests_running" in metrics


def test_the_load_of_readme_is_driven(tmp_path: Path, service: Service) -> None:
    [command] = commands("pagefork bench serve")
    assert "--num-prompts 64 --request-rate 8" in command
    quick = command.replace("--num-prompts 64 --request-rate 8", "--num-prompts 4 --request-rate 50")
    assert "time to first token" in run(["bash", "-c", quick], service, tmp_path)

"""The engines that are compared, and the processes that they run in."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from compare_environments import CACHE, Missing, environment
from peers import vllm_cpu
from peers.protocol import Load
from shared import ROOT

MODELS = CACHE / "models"
LOGS = CACHE / "logs"
START = 900.0  # seconds within which an engine must be ready: it may convert the model and compile
ANSWER = 600.0


class Engine(NamedTuple):
    """name: in the result; peer: the file in peers/; variant: its precision; bits: of a weight, 16 or more counts as whole;
    place: its environment, None for this one; variables: more of those for its process, from the environment's folder."""

    name: str
    peer: str
    variant: str
    bits: int = 16
    place: str | None = None
    variables: Callable[[Path], dict[str, str]] = lambda folder: {}

    @property
    def ours(self) -> bool:
        return self.peer == "pagefork"

    @property
    def quantised(self) -> bool:
        return self.bits < 16


ENGINES = (
    Engine("Pagefork", "pagefork", "bf16"),
    Engine("llama.cpp bf16", "llama_cpp", "bf16", 16, "llama_cpp"),
    Engine("OpenVINO bf16", "openvino_genai", "bf16", 16, "openvino_genai"),
    Engine("OpenVINO f32", "openvino_genai", "f32", 16, "openvino_genai"),
    Engine("vLLM bf16", "vllm_cpu", "bf16", 16, "vllm_cpu", vllm_cpu.variables),
    Engine("CTranslate2 f32", "ctranslate2", "float32", 32, "ctranslate2"),
    Engine("transformers generate", "transformers_generate", "bfloat16", 16, "transformers"),
    Engine("transformers batching", "transformers_batching", "bfloat16", 16, "transformers"),
    Engine("Pagefork int8", "pagefork", "int8", 8),
    Engine("llama.cpp q8_0", "llama_cpp", "q8_0", 8, "llama_cpp"),
    Engine("OpenVINO int8", "openvino_genai", "int8-bf16", 8, "openvino_genai"),
    Engine("CTranslate2 int8", "ctranslate2", "int8", 8, "ctranslate2"),
)


class Failed(Exception):
    """An engine can't go on; the message says why."""


class Worker:
    """The process of an engine. It sleeps but while it answers."""

    def __init__(self, engine: Engine, command: list[str], variables: Mapping[str, str]) -> None:
        """Waits until the model is loaded. Raises Failed."""
        self.engine = engine
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{engine.name.replace(' ', '-')}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1", **variables},
                start_new_session=True,
                text=True,
            )
        try:
            self.ready: dict[str, Any] = self._answer(START)["ready"]
        except Failed:
            self.close()
            raise

    def run(self, load: Load, warm: bool = False) -> dict[str, Any]:
        """The answer of peers/protocol.py. Raises Failed where the process is lost."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({**load._asdict(), "warm": warm}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._ended()) from None
        return self._answer(ANSWER, alone=False)

    def cpu_seconds(self) -> float:
        """Spent by the process and its children that live."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it may have ended
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._process.pid:  # its process group
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _answer(self, seconds: float, alone: bool = True) -> dict[str, Any]:
        """The next line. Raises Failed without one, or if it is the only one and tells of an error."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise Failed(f"no answer within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._ended())
        answer: dict[str, Any] = json.loads(line)
        if alone and "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _ended(self) -> str:
        try:
            return f"the process ended with status {self._process.wait(10)}"
        except subprocess.TimeoutExpired:
            return "the process closed its output"


def start(engine: Engine, model: str, folders: Mapping[str, Path]) -> Worker:
    """Raises Failed if the environment can't be made or the engine does not start."""
    MODELS.mkdir(parents=True, exist_ok=True)
    python, variables = sys.executable, {}
    try:
        if engine.place is not None:
            folder = environment(engine.place, folders.get(engine.place))
            python, variables = str(folder / "bin/python"), engine.variables(folder)
    except Missing as error:
        raise Failed(f"not installed: {error}") from error
    script = ROOT / "benchmarks/peers/serve.py"
    return Worker(engine, [python, "-P", str(script), engine.peer, engine.variant, model, str(MODELS)], variables)

"""Run everything that needs a CUDA device, within minutes: the tests marked `gpu`, then the benchmarks of engine and kernels.

    make gpu [GPU_PYTHON=python3] [GPU_OUTPUT=DIR]
    python benchmarks/gpu.py [--output DIR --seconds 460 --only sample ...]

A part that fails or runs out of its time does not stop the others. Writes four files: gpu.json with the cases of all
benchmarks, gpu_engine.png and gpu.png that draw those of the engine and of the kernels, and gpu.log with all that was
printed. Where `pagefork` is not installed it is laid out by links in a temporary folder. Exit status: 0, all is well; 1, a
part failed; 3, no CUDA device; 4, a package is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "pytest": "pytest",
    "msgspec": "msgspec",
    "zmq": "pyzmq",
}
NO_DEVICE, NO_PACKAGE = 3, 4
LEAST = 5.0  # seconds; a part that has less left does not begin
GRACE = 10.0  # seconds that a benchmark may take beyond its share to end the case at hand
DYING = 5.0  # seconds for a part that is told to end
SOAK_SECONDS = 45
SOAK = ROOT / "tests/engine/fused/test_gpu_soak.py"


class Part(NamedTuple):
    """share: of the time that is left for it and what follows; script: of benchmarks/, None for tests."""

    name: str
    share: float
    script: str | None = None


PARTS = (
    Part("tests", 0.25),
    Part("gpu_engine", 0.52, "gpu_engine.py"),
    Part("soak", 0.38),
    Part("attention", 0.22, "kernels/attention.py"),
    Part("layers", 0.2, "kernels/layers.py"),
    Part("sample", 0.22, "kernels/sample.py"),
    Part("top_logprobs", 0.22, "kernels/top_logprobs.py"),
    Part("beam_merge", 0.3, "kernels/beam_merge.py"),
    Part("similarity", 0.5, "kernels/similarity.py"),
    Part("copy_blocks", 1.0, "kernels/copy_blocks.py"),
)


class Outcome(NamedTuple):
    name: str
    status: int | None  # exit status; None: it ran out of time or never began
    seconds: float
    said: str

    def __str__(self) -> str:
        how = {0: "ok", None: "out of time"}.get(self.status, f"failed ({self.status})")
        lines = self.said.strip().splitlines()
        return f"{self.name:<14} {how:<12} {self.seconds:6.0f} s  {lines[-1][:150] if lines else ''}"


def command(part: Part, seconds: float, folder: Path) -> list[str]:
    """What runs a part that has so many seconds. Benchmarks write into `folder`."""
    if part.script is not None:
        script = str(ROOT / "benchmarks" / part.script)
        return [sys.executable, script, "--seconds", f"{max(LEAST, seconds - GRACE):.0f}", "--output", str(folder)]
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu and not long", "-q", "-p", "no:cacheprovider"]
    if part.name == "soak":
        return [*pytest, str(SOAK)]
    side_by_side = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return [*pytest, *side_by_side, "--ignore", str(SOAK), *gpu_tests(ROOT / "tests")]


def gpu_tests(tests: Path) -> list[str]:
    """The folders of the tests marked `gpu`. The files in others may import what this machine lacks."""
    return [str(folder) for folder in sorted(tests.rglob("fused")) if folder.is_dir()]


def run(part: Part, seconds: float, folder: Path, environment: dict[str, str]) -> Outcome:
    """Runs a part to its end, or for so many seconds; what it says is shown as it comes."""
    start, said = time.monotonic(), folder / f"{part.name}.log"
    if seconds < LEAST:
        return Outcome(part.name, None, 0.0, "never began")
    with said.open("w") as log:
        process = subprocess.Popen(
            command(part, seconds, folder),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            stop(process)
    text = said.read_text(errors="replace")
    print(f"== {part.name}\n{text}", flush=True)
    return Outcome(part.name, status, time.monotonic() - start, text)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Tells a process and those that it started to end, and kills what does not."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(DYING)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(parts: Sequence[Part], seconds: float, folder: Path, environment: dict[str, str]) -> list[Outcome]:
    """What a part leaves of its share goes to those that follow."""
    end, outcomes = time.monotonic() + seconds, []
    for part in parts:
        left = end - time.monotonic()
        share = 1.0 if part is parts[-1] else part.share
        outcomes.append(run(part, left * share, folder, environment))
    return outcomes


def collected(folder: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One result of all benchmarks that wrote one, those of kernels in a list, and how the parts ended."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("kernel_*.json"))]
    parts = [{"name": outcome.name, "status": outcome.status, "seconds": round(outcome.seconds, 1)} for outcome in outcomes]
    engine = folder / "gpu_engine.json"
    return {"parts": parts, "engine": json.loads(engine.read_text()) if engine.exists() else None, "results": results}


def missing() -> list[str]:
    """Packages that are needed and not installed, by the names of their distributions."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def lay_out(folder: Path) -> None:
    """The package `pagefork` by links, as an installation has it."""
    package = folder / "pagefork"
    package.mkdir()
    for source in [*(ROOT / "engine").iterdir(), ROOT / "kernels", ROOT / "scheduler"]:
        (package / source.name).symlink_to(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the four files")
    parser.add_argument("--seconds", type=float, default=460, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    args = parser.parse_args()
    if lacking := missing():
        print(f"`make gpu` needs packages that are not installed: {', '.join(lacking)}", file=sys.stderr)
        sys.exit(NO_PACKAGE)
    import torch

    if not torch.cuda.is_available():
        print("`make gpu` needs a CUDA device, and torch finds none", file=sys.stderr)
        sys.exit(NO_DEVICE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(folder / "cache"), "SOAK_SECONDS": str(SOAK_SECONDS)}
        if importlib.util.find_spec("pagefork") is None:
            lay_out(folder)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        parts = [part for part in PARTS if args.only is None or part.name in args.only]
        outcomes = run_all(parts, args.seconds, folder, environment)
        write(args.output, collected(folder, outcomes), outcomes)
        if (folder / "gpu_engine.png").exists():
            shutil.copy(folder / "gpu_engine.png", args.output)
    print("== summary", *outcomes, sep="\n")
    sys.exit(any(outcome.status != 0 for outcome in outcomes))


def write(output: Path, result: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    sys.path[:0] = [str(ROOT / "benchmarks/kernels")]
    from chart import draw_chart

    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "gpu.log").write_text("".join(f"== {outcome.name}\n{outcome.said}\n" for outcome in outcomes))
    draw_chart(result["results"], output / "gpu.png")


if __name__ == "__main__":
    main()

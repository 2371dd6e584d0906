"""Run everything that needs a CUDA device, within minutes: the tests marked `gpu`, then the benchmarks of the kernels.

    make gpu [GPU_PYTHON=python3] [GPU_OUTPUT=DIR]
    python benchmarks/gpu.py [--output DIR --seconds 460 --only sample ...]

A part that fails or runs out of its time does not stop the others. Writes three files: gpu.json with the cases of all
benchmarks, gpu.png that draws them, and gpu.log with all that was printed. Where `pagefork` is not installed it is laid
out by links in a temporary folder. Exit status: 0, all is well; 1, a part failed; 3, no CUDA device; 4, a package is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
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
GRACE = 25.0  # seconds that a benchmark may take beyond its share to end the case at hand


class Part(NamedTuple):
    """name: "tests", or a script of benchmarks/kernels; share: of the time that is left for it and what follows."""

    name: str
    share: float


PARTS = (
    Part("tests", 0.45),
    Part("sample", 0.45),
    Part("top_logprobs", 0.3),
    Part("beam_merge", 0.4),
    Part("similarity", 0.5),
    Part("copy_blocks", 1.0),
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
    if part.name == "tests":
        side_by_side = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        return [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            *side_by_side,
            *gpu_tests(ROOT / "tests"),
        ]
    script = ROOT / "benchmarks/kernels" / f"{part.name}.py"
    return [sys.executable, str(script), "--seconds", f"{max(0.0, seconds - GRACE):.0f}", "--output", str(folder)]


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
            os.killpg(process.pid, 9)
            process.wait()
    text = said.read_text(errors="replace")
    print(f"== {part.name}\n{text}", flush=True)
    return Outcome(part.name, status, time.monotonic() - start, text)


def run_all(parts: Sequence[Part], seconds: float, folder: Path, environment: dict[str, str]) -> list[Outcome]:
    """What a part leaves of its share goes to those that follow."""
    end, outcomes = time.monotonic() + seconds, []
    for part in parts:
        left = end - time.monotonic()
        share = 1.0 if part is parts[-1] else part.share
        outcomes.append(run(part, left * share, folder, environment))
    return outcomes


def collected(folder: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One result of all benchmarks that wrote one, and how the parts ended."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("kernel_*.json"))]
    parts = [{"name": outcome.name, "status": outcome.status, "seconds": round(outcome.seconds, 1)} for outcome in outcomes]
    return {"parts": parts, "results": results}


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
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the three files")
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
        environment |= {"PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
        if importlib.util.find_spec("pagefork") is None:
            lay_out(folder)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        parts = [part for part in PARTS if args.only is None or part.name in args.only]
        outcomes = run_all(parts, args.seconds, folder, environment)
        write(args.output, collected(folder, outcomes), outcomes)
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

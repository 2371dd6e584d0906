"""How do rates, times and memory grow with what is asked for? Batch, context, prompt, beam width, vocabulary, sequences.

    python benchmarks/growth.py [--only batch beam] [--quick]

Each case runs in a process of its own, so that one that fails, dies or hangs does not lose the others; it is told with its
error, and the exit status is 1. Writes growth.json, to which a run with --only adds, and growth.png. Takes about ten minutes
on two cores. With --quick it only shows that the cases run, and writes to build/growth.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent)]
from gpu_models import made
from growth_cases import CASES, QUICK, TRUNK, TRUNK_NAME, Point, Sizes
from growth_chart import draw_chart

PATIENCE = 300.0  # seconds after which a case is taken for dead


def measured(name: str, model: Path, quick: bool) -> dict[str, Any]:
    """The points of a case, measured by another process, or its error; and how long it took."""
    command = [sys.executable, __file__, "--case", name, "--model", str(model), *(["--quick"] if quick else [])]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"error": f"no result within {PATIENCE:.0f} s"}
    except (ValueError, IndexError):
        found = {"error": f"the process ended with status {done.returncode}"}
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def measure(name: str, model: Path, sizes: Sizes) -> dict[str, list[Point] | str]:
    """In the process of a case: its points, or its error."""
    try:
        return {"points": CASES[name](model, sizes)}
    except Exception as error:  # noqa: BLE001  # whatever it is, the other cases go on
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def line(point: Point) -> str:
    """A point in words."""
    flat = {**point, **point.get("parts", {})}
    flat.pop("parts", None)
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in flat.items())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="sizes that only show that the cases run")
    parser.add_argument("--out", type=Path, help="folder for growth.json and growth.png")
    parser.add_argument("--case", choices=CASES, help="in the process of a case: which it is")
    parser.add_argument("--model", type=Path, help="in the process of a case: the checkpoint")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    if args.case is not None:
        print(json.dumps(measure(args.case, args.model, QUICK if args.quick else Sizes())))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the checkpoint is removed
    from shared import ROOT, facts  # here, since it imports transformers, which the cases do without

    out = args.out or ROOT / ("build/growth" if args.quick else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "growth.json"
    cases: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() and args.only != list(CASES) else {}
    with made(TRUNK, torch.bfloat16) as model:
        for name in args.only:
            found = measured(name, model, args.quick)
            print(f"{name}, {found['seconds']} s", found.get("error", ""), flush=True)
            print("".join(f"    {line(point)}\n" for point in found.get("points", [])), end="", flush=True)
            if "points" in found or "points" not in cases.get(name, {}):
                cases[name] = {"asks": CASES[name].__doc__, **found, "date": facts()["date"]}
    result = {**facts(), "model": TRUNK_NAME, "cases": cases}
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw_chart(result, out / "growth.png")
    sys.exit(any("error" in cases[name] for name in args.only))


if __name__ == "__main__":
    main()

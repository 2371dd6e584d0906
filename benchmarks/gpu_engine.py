"""How near does the engine on a CUDA device come to what the device allows, and how far ahead of transformers is it?

Random weights in the sizes of Qwen3-0.6B and Llama-3-8B, in bfloat16: decoding 1, 64 and 256 sequences, a prompt of 4096
tokens, a mixed load, eight sequences behind one prefix, beam search up to width 4096, and what CUDA graphs, overlap and
`batch_invariant` change. `gpu_cases.py` has the cases, `gpu_peers.py` the same by transformers, and `gpu_bench.py` says
how they are timed.

    python benchmarks/gpu_engine.py [--seconds 600 --only decode --output DIR]
    python benchmarks/gpu_engine.py --device cpu --tiny

The cases that say most come first. They run in a process that is started again when a case has left the device
unusable, died or hung: such a case is told with its error, and the others go on. Writes gpu_engine.json and .png.
Exit status: 0, all is well; 1, a case failed; 3, no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent)]
import gpu_cases as ours
import gpu_peers as transformers
import torch
from gpu_bench import TINY, Bench, Sizes
from gpu_cases import Row
from gpu_chart import draw_chart
from gpu_models import LLAMA, QWEN, checkpoint
from shared import ROOT, facts

NO_DEVICE = 3
PATIENCE = 120.0  # seconds without a result after which the process with the cases is taken for dead; kernels compile first


class Case(NamedTuple):
    """name: what is asked; how: by whom, or with what changed."""

    name: str
    how: str
    run: Callable[[Bench], Row]


class Group(NamedTuple):
    """Cases of one process."""

    model: str
    cases: tuple[Case, ...]


PAGEFORK, GENERATE, BATCHED = "Pagefork", "transformers generate", "transformers continuous batching"


def _decode_with(**settings: Any) -> Case:
    how = "Pagefork, " + ", ".join(f"{name}={value}" for name, value in settings.items())
    return Case("decode 64", how, partial(ours.decode, batch=64, **settings))


GROUPS = (
    Group(
        QWEN,
        (
            Case("decode 64", PAGEFORK, partial(ours.decode, batch=64)),
            Case("decode 1", PAGEFORK, partial(ours.decode, batch=1)),
            Case("decode 256", PAGEFORK, partial(ours.decode, batch=256)),
            Case("prompt", PAGEFORK, ours.prefill),
            Case("load of 256", PAGEFORK, partial(ours.load, count=256)),
            Case("load of 64", PAGEFORK, partial(ours.load, count=64)),
            Case("8 of a prefix", PAGEFORK, ours.group),
            Case("8 of a prefix", "Pagefork, trunks ignored", partial(ours.group, trunks=False)),
            Case("8 of a prefix", "Pagefork, 8 prompts", partial(ours.group, apart=True)),
            Case("beam 4 of 8 prompts", PAGEFORK, partial(ours.beam, searches=8, width=4)),
        ),
    ),
    Group(
        LLAMA,
        (
            Case("decode 64", PAGEFORK, partial(ours.decode, batch=64)),
            Case("decode 1", PAGEFORK, partial(ours.decode, batch=1)),
            Case("prompt", PAGEFORK, ours.prefill),
            Case("decode 256", PAGEFORK, partial(ours.decode, batch=256)),
        ),
    ),
    Group(
        QWEN,
        (
            Case("load of 64", BATCHED, partial(transformers.load, count=64)),
            Case("decode 64", GENERATE, partial(transformers.decode, batch=64)),
            Case("beam 4 of 8 prompts", GENERATE, partial(transformers.beam, searches=8, width=4)),
        ),
    ),
    Group(
        QWEN,
        (
            _decode_with(cuda_graphs=False),
            _decode_with(overlap=False),
            _decode_with(cuda_graphs=False, overlap=False),
            _decode_with(batch_invariant=True),
            Case("prompt", "Pagefork, batch_invariant=True", partial(ours.prefill, batch_invariant=True)),
            Case("widest beam", PAGEFORK, ours.wide_beam),
        ),
    ),
)


def measured(group: Group, case: Case, bench: Bench) -> Row:
    """A row of the result: what was found, or the error."""
    row = {"case": case.name, "how": case.how, "model": group.model}
    random.seed(case.name)
    begin = time.monotonic()
    try:
        row |= case.run(bench)
    except Exception as error:  # noqa: BLE001  # whatever it is, the other cases go on
        row["error"] = f"{type(error).__name__}: {error}"[:1000]
        bench.drop()
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def measure(group: Group, args: argparse.Namespace, directory: Path, rows: Path) -> None:
    """In the process with the cases: appends a line to `rows` for each that is not there yet.

    Ends early where the device can't be used any more.
    """
    sizes, dtype = (TINY, torch.float32) if args.tiny else (Sizes(), torch.bfloat16)
    bench = Bench(directory, torch.device(args.device), sizes, dtype)
    rates = {"copy_gb_per_s": bench.bytes_per_s / 1e9, "product_tflop_per_s": bench.flops_per_s / 1e12}
    for case in group.cases[len(_read(rows)) :]:
        with rows.open("a") as file:
            file.write(json.dumps(measured(group, case, bench) | rates) + "\n")
        bench.wait()  # raises after an error that the device does not recover from


def _read(rows: Path) -> list[Row]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def drive(group: Group, command: Sequence[str], rows: Path, end: float, patience: float = PATIENCE) -> list[Row]:
    """Starts `command`, which appends to `rows`, until there is one for each case of the group or the time is over."""
    while len(_read(rows)) < len(group.cases) and time.monotonic() < end:
        before = len(_read(rows))
        with subprocess.Popen(command) as process:
            try:
                _watch(process, rows, end, patience)
            finally:
                if late := process.poll() is None:
                    process.kill()
        if time.monotonic() >= end or len(_read(rows)) == len(group.cases):
            break
        if late or len(_read(rows)) == before:
            case = group.cases[len(_read(rows))]
            error = "no result in time" if late else f"the process ended with status {process.returncode}"
            with rows.open("a") as file:
                file.write(json.dumps({"case": case.name, "how": case.how, "model": group.model, "error": error}) + "\n")
    return _read(rows)


def _watch(process: subprocess.Popen[bytes], rows: Path, end: float, patience: float) -> None:
    """Until the process is over, or has shown nothing for too long; prints what it finds."""
    shown, last = len(_read(rows)), time.monotonic()
    while True:
        ended = process.poll() is not None
        found = _read(rows)
        for row in found[shown:]:
            print(line(row), flush=True)
        if len(found) > shown:
            shown, last = len(found), time.monotonic()
        if ended or time.monotonic() > min(end, last + patience):
            return
        time.sleep(0.1)


def line(row: Row) -> str:
    what = f"{row['model']:<11} {row['case']:<20} {row['how']:<42}"
    if "error" in row:
        return f"{what} failed: {row['error'][:300]}"
    limit = f"  {row['value'] / row['limit']:.2f} x the limit ({row['limit']:.2f})" if row["limit"] else ""
    host = "".join(f"  {name} {ms:.2f}" for name, ms in row.get("host_ms", {}).items())
    return f"{what} {row['value']:10.2f} {row['unit']}{limit}{host}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="for all cases together")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder for the JSON and the chart")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name, engine or model begin like this")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the cases run")
    parser.add_argument("--group", type=int, help="in the process with the cases: which they are")
    parser.add_argument("--directory", type=Path, help="in the process with the cases: the checkpoint")
    parser.add_argument("--rows", type=Path, help="in the process with the cases: where their rows go")
    return parser.parse_args()


def chosen(only: Sequence[str]) -> list[Group]:
    """The groups with the cases that are asked for."""

    def asked(group: Group, case: Case) -> bool:
        return any(text.startswith(tuple(only)) for text in (case.name, case.how, group.model))

    return [Group(group.model, tuple(case for case in group.cases if asked(group, case))) for group in GROUPS]


def main() -> None:
    args = parsed()
    groups = chosen(args.only)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_engine: needs a CUDA device", file=sys.stderr)
        sys.exit(NO_DEVICE)
    if args.group is not None:
        measure(groups[args.group], args, args.directory, args.rows)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the checkpoints are removed
    end, rows = time.monotonic() + args.seconds, []
    dtype = torch.float32 if args.tiny else torch.bfloat16
    with ExitStack() as stack:
        made: dict[str, Path] = {}
        for index, group in enumerate(groups):
            if not group.cases or time.monotonic() > end:
                continue
            if group.model not in made:
                made[group.model] = stack.enter_context(checkpoint(group.model, args.tiny, dtype))
            file = made[group.model] / f"rows-{index}.jsonl"
            own = ["--group", str(index), "--directory", str(made[group.model]), "--rows", str(file)]
            rows += drive(group, [sys.executable, *sys.argv, *own], file, end)
    failed = write(args.output, rows, sum(len(group.cases) for group in groups))
    sys.exit(failed)


def write(output: Path, rows: Sequence[Row], cases: int) -> bool:
    """Writes the JSON and the chart. Whether a case failed."""
    result: dict[str, Any] = {**facts(), "op": "engine", "rows": rows, "left_out": cases - len(rows)}
    if result["left_out"]:
        print(f"{result['left_out']} of {cases} cases were left out: the time was over")
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu_engine.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_chart(rows, output / "gpu_engine.png")
    return any("error" in row for row in rows)


if __name__ == "__main__":
    main()

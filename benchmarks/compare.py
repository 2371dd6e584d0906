"""How fast is Pagefork on a CPU beside llama.cpp, OpenVINO GenAI, vLLM, CTranslate2 and transformers?

The same checkpoint, random prompts, lengths and cores for all; end tokens ignored, output tokens per second, prefill
included. Every engine is a process of its own (benchmarks/peers/) in an environment of its own, made on the first run in
.cache/peers/; it loads the model once and sleeps while another one runs. After a warm-up per load they take turns,
A B C A B C; each round has prompts of its own. An engine far behind the best one of its kind in the first round is not
run again. What can't be installed or fails is reported with its reason. The limit is that of compare_limits.py.

    python benchmarks/compare.py [--rounds 3 --engines Pagefork llama.cpp --loads single batch-16 --out DIR]
    python benchmarks/compare.py --quick

Names of engines and loads are given by their beginnings. Writes compare.json, compare.md and compare.png, prints the table.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]
from compare_engines import ENGINES, Failed, Worker, start
from compare_limits import Rates, least_seconds, measure_rates, outline
from compare_report import draw_chart, summarise, table
from peers.protocol import Load
from shared import RANDOM_LLAMA, ROOT, facts, random_llama

LOADS = {
    "single": Load(1, 32, 128),
    "batch-16": Load(16, 128, 64),
    "batch-64": Load(64, 128, 64),
    "beam-4": Load(8, 128, 64, beam=4),
}
QUICK = {name: Load(min(load.prompts, 3), 8, 6, load.beam) for name, load in LOADS.items()}
PAUSE = 0.3  # seconds after a run, in which its threads fall asleep
AWAKE = 0.02  # of the cores: if engines that should sleep take more, the run says so

Runs = list[dict[str, Any]]


def take_turns(workers: dict[str, Worker], loads: Mapping[str, Load], rounds: int, seed: int, far: float) -> Runs:
    """One entry per run, with seconds and tokens, or with why there are none. Who fails does not run that load again."""
    runs: Runs = []
    engines = list(workers)
    for name, load in loads.items():
        able = [engine for engine in engines if _run(workers, runs, engine, name, load._replace(seed=seed), -1)]
        for turn in range(rounds):
            this = load._replace(seed=seed + 1 + turn)
            able = [engine for engine in able if _run(workers, runs, engine, name, this, turn)]
            if turn == 0:
                able = _near(workers, runs, able, name, far)
    return [run for run in runs if run["round"] >= 0 or "seconds" not in run]


def _run(workers: dict[str, Worker], runs: Runs, engine: str, name: str, load: Load, turn: int) -> bool:
    """Appends a run; turn -1 is the warm-up. Whether there is a time; a process that is lost is dropped."""
    row = {"engine": engine, "load": name, "round": turn}
    if engine not in workers:
        runs.append(row | {"error": "lost before"})
        return False
    others = [worker for other, worker in workers.items() if other != engine]
    before = sum(worker.cpu_seconds() for worker in others)
    try:
        row |= workers[engine].run(load, warm=turn < 0)
    except Failed as error:
        row["error"] = str(error)
        workers.pop(engine).close()
    row["cpu_seconds_of_others"] = round(sum(worker.cpu_seconds() for worker in others) - before, 2)
    runs.append(row)
    if turn >= 0 or "seconds" not in row:
        print(line(row), flush=True)
    time.sleep(PAUSE)
    return "seconds" in row


def _near(workers: Mapping[str, Worker], runs: Runs, able: Sequence[str], name: str, far: float) -> list[str]:
    """Those within `far` of the best that computes with weights of the same kind, and our own."""
    first = [run for run in runs if run["load"] == name and run["round"] == 0 and "seconds" in run]
    rates = {run["engine"]: run["tokens"] / run["seconds"] for run in first}
    kept = []
    for engine in able:
        kind = workers[engine].engine.quantised
        best = max(rates[other] for other in able if workers[other].engine.quantised == kind)
        if workers[engine].engine.ours or rates[engine] >= far * best:
            kept.append(engine)
    return kept


def line(row: Mapping[str, Any]) -> str:
    what = f"{row['load']:<9} round {row['round']}  {row['engine']:<22}"
    if "seconds" not in row:
        return f"{what} {row.get('unsupported') or 'failed: ' + row['error']}"
    awake = row["cpu_seconds_of_others"] / row["seconds"]
    note = f"  others took {awake:.2f} cores" if awake > AWAKE else ""
    return f"{what} {row['seconds']:7.2f} s  {row['tokens'] / row['seconds']:8.1f} tokens/s{note}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=[""], help="of " + ", ".join(engine.name for engine in ENGINES))
    parser.add_argument("--loads", nargs="+", default=[""], help="of " + ", ".join(LOADS))
    parser.add_argument("--far", type=float, default=0.5, help="share of the best rate below which an engine runs once; 0: never")
    parser.add_argument("--model", help="a checkpoint directory of a Llama; default: a random one of 134.5 M parameters")
    parser.add_argument("--environment", action="append", default=[], metavar="NAME=PATH", help="a ready one for a peer")
    parser.add_argument("--quick", action="store_true", help="loads that only show that everything runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for compare.json, .md and .png")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main() -> None:
    args = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the engines are ended
    folders = {name: Path(path).absolute() for name, _, path in (given.partition("=") for given in args.environment)}
    engines = [engine for engine in ENGINES if engine.name.startswith(tuple(args.engines))]
    loads = {name: load for name, load in (QUICK if args.quick else LOADS).items() if name.startswith(tuple(args.loads))}
    model = args.model or random_llama()
    rates = measure_rates()
    found: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        for engine in engines:
            try:
                workers[engine.name] = start(engine, model, folders)
                stack.callback(workers[engine.name].close)
                found[engine.name] = workers[engine.name].ready
            except Failed as error:
                found[engine.name] = {"error": str(error)}
            found[engine.name] |= {"bits": engine.bits, "ours": engine.ours}
            print(f"{engine.name}: {found[engine.name].get('error') or found[engine.name]['settings']}", flush=True)
        runs = take_turns(workers, loads, args.rounds, args.seed, args.far)
    rates = Rates(*map(max, rates, measure_rates()))  # again, in case something disturbed the first time
    write(args.out, found, loads, runs, rates, model)


def write(out: Path, engines: dict[str, Any], loads: Mapping[str, Load], runs: Runs, rates: Rates, model: str) -> None:
    shape = outline(Path(model))
    described = {
        name: {
            **load._asdict(),
            "limit": load.prompts * load.output / least_seconds(load, shape, rates),
            "limit_8_bits": load.prompts * load.output / least_seconds(load, shape, rates, 1),
        }
        for name, load in loads.items()
    }
    result = {
        **facts(),
        "model": RANDOM_LLAMA if model == random_llama() else model,
        "read_gb_per_s": rates.read / 1e9,
        "product_gflop_per_s": rates.product / 1e9,
        "engines": engines,
        "loads": described,
        "summary": summarise(engines, described, runs),
        "runs": runs,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (out / "compare.md").write_text(text)
    print("\n" + text)
    draw_chart(result, out / "compare.png")


if __name__ == "__main__":
    main()

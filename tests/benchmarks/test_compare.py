"""benchmarks/compare.py without its peers: turns, failures, limits and what is made of the runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402
import compare_environments  # noqa: E402
import compare_limits  # noqa: E402
import compare_report  # noqa: E402
from compare_engines import Engine, Failed, Worker  # noqa: E402
from peers.protocol import Load, Unsupported, answer  # noqa: E402

LOAD = Load(2, 3, 4)
PEER = """
import os, sys, time
sys.path.append({benchmarks!r})
from pathlib import Path
from peers.protocol import serve

class Peer:
    settings = "toy"
    def prepare(self, load):
        {prepare}
        return lambda: (time.sleep(0.01), load.prompts * load.output)[1]

def start():
    print("chatter of a library")
    {start}
    return Peer(), {{"toy": "1"}}

serve(start)
"""


def worker(prepare: str = "pass", start: str = "pass", **engine: Any) -> Worker:
    code = PEER.format(benchmarks=str(ROOT / "benchmarks"), prepare=prepare, start=start)
    return Worker(Engine(engine.pop("name", "toy"), "toy", "", **engine), [sys.executable, "-P", "-c", code], {})


@pytest.fixture(autouse=True)
def _logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("compare_engines.LOGS", tmp_path)


def test_engines_take_turns_and_who_fails_stops_no_other() -> None:
    """A waiting engine takes no time of a core."""
    workers = {
        "a": worker(),
        "dies": worker("os._exit(3) if load.output == 4 else None"),
        "raises": worker("1 / 0"),
        "b": worker(),
    }
    try:
        runs = compare.take_turns(workers, {"x": LOAD, "y": Load(1, 2, 8)}, 2, 0, far=0)
    finally:
        for one in workers.values():
            one.close()
    times = [(run["load"], run["round"], run["engine"]) for run in runs if "seconds" in run]
    assert times == [(load, turn, engine) for load in "xy" for turn in (0, 1) for engine in "ab"]
    told = {run["engine"]: run["error"] for run in runs if run["load"] == "x" and "error" in run}
    assert told == {"dies": "the process ended with status 3", "raises": "ZeroDivisionError: division by zero"}
    assert [run["error"] for run in runs if run["engine"] == "dies"][1:] == ["lost before"]
    assert all(run["tokens"] == 8 and run["cpu_seconds_of_others"] < 0.1 for run in runs if "seconds" in run)


def test_an_engine_that_does_not_start_says_why() -> None:
    with pytest.raises(Failed, match="RuntimeError: no such model"):
        worker(start="raise RuntimeError('no such model')")
    with pytest.raises(Failed, match="ended with status 7"):
        worker(start="os._exit(7)")


def test_an_engine_far_behind_its_kind_runs_once() -> None:
    class Fake:
        def __init__(self, seconds: float, peer: str = "peer", bits: int = 16) -> None:
            self.engine, self._seconds = Engine("", peer, "", bits), seconds

        def run(self, load: Load, warm: bool = False) -> dict[str, Any]:
            return {"seconds": self._seconds, "tokens": 8}

        def cpu_seconds(self) -> float:
            return 0

    workers: dict[str, Any] = {
        "ours": Fake(9, "pagefork"),
        "best": Fake(1),
        "near": Fake(1.9),
        "far": Fake(2.1),
        "small": Fake(5, bits=8),
    }
    runs = compare.take_turns(workers, {"x": LOAD}, 2, 0, far=0.5)
    assert [run["engine"] for run in runs if run["round"] == 1] == ["ours", "best", "near", "small"]


@pytest.mark.parametrize(
    ("came", "told"), [(8, {"seconds", "tokens"}), (7, {"error"}), (Unsupported("no"), {"unsupported"}), (OSError(), {"error"})]
)
def test_only_complete_answers_count(came: int | Exception, told: set[str]) -> None:
    def prepare(load: Load) -> Any:
        if isinstance(came, Exception):
            raise came
        return lambda: came

    assert answer(SimpleNamespace(prepare=prepare, settings=""), LOAD._asdict()).keys() == told


def test_prompts_are_those_of_the_seed() -> None:
    assert LOAD.token_ids() == LOAD.token_ids() != LOAD._replace(seed=1).token_ids()
    assert [len(prompt) for prompt in LOAD.token_ids()] == [3, 3]


@pytest.mark.parametrize("load", [Load(2, 5, 3), Load(3, 4, 6, beam=2)])
@pytest.mark.parametrize("rates", [compare_limits.Rates(1e3, 1e12), compare_limits.Rates(1e12, 1e3)])
def test_the_limit_is_the_work_counted_token_by_token(load: Load, rates: compare_limits.Rates) -> None:
    model = compare_limits.Outline(hidden=6, layers=2, heads=3, groups=1, head_dim=2, between=10, vocabulary=20)
    linear = 2 * (6 * 6 + 2 * 6 * 2 + 6 * 6 + 3 * 6 * 10)  # q, k and v, o, MLP; of both layers
    head, rows = 20 * 6, load.prompts * (load.beam or 1)

    def flops(context: int) -> int:
        """Of a token that sees `context` of them, without the last layer."""
        return 2 * linear + 2 * sum(2 * 2 * 2 for _head in range(3) for _key in range(context))

    work = load.prompts * (sum(flops(context) for context in range(1, load.input + 1)) + 2 * head)
    read = 2 * (linear + head)
    for step in range(1, load.output):
        work += rows * (flops(load.input + step) + 2 * head)
        read += 2 * (linear + head) + load.prompts * (load.input + step) * 2 * 2 * 2 * 2  # layers, K and V, d, bytes
    expected = max(work / rates.product, read / rates.read)
    assert compare_limits.least_seconds(load, model, rates) == pytest.approx(expected)


def result() -> dict[str, Any]:
    engines = {
        "ours": {"bits": 16, "ours": True, "settings": "s", "versions": {"o": "1"}},
        "peer": {"bits": 32, "ours": False, "settings": "s", "versions": {"p": "2"}},
        "gone": {"bits": 16, "ours": False, "error": "not installed: no compiler"},
        "none": {"bits": 8, "ours": False, "settings": "s", "versions": {}},
    }
    loads = {"x": {**LOAD._asdict(), "limit": 10.0, "limit_8_bits": 20.0}}
    seconds = {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 2.0]}
    runs = [
        {"engine": engine, "load": "x", "round": turn, "seconds": time, "tokens": 8}
        for engine, times in seconds.items()
        for turn, time in enumerate(times)
    ] + [{"engine": "none", "load": "x", "round": -1, "unsupported": "no beams"}]
    facts = {"threads": 2, "cpu": "c", "date": "2026-01-01", "read_gb_per_s": 1, "product_gflop_per_s": 1, "model": "m"}
    return {**facts, "engines": engines, "loads": loads, "runs": runs, "summary": compare_report.summarise(engines, loads, runs)}


def test_ratios_are_those_of_rounds_that_both_ran() -> None:
    rows = result()["summary"]["x"]["engines"]
    assert rows["ours"] == {"median": 4.0, "lowest": 2.0, "highest": 8.0, "rounds": 3, "share_of_limit": 0.4}
    assert rows["peer"]["ahead"] == {"median": 1.5, "lowest": 1.0, "highest": 2.0}
    assert rows["gone"] == {"error": "not installed: no compiler"} and rows["none"] == {"unsupported": "no beams"}
    assert result()["summary"]["x"]["best_peers"] == {"whole": {"engine": "peer", "ahead": rows["peer"]["ahead"]}}


def test_the_table_tells_what_failed_and_why(tmp_path: Path) -> None:
    text = compare_report.table(result())
    assert "| **ours** | **4** |" in text and "| peer | 4 (1.50x) |" in text and "| ahead of the best peer | 1.50x |" in text
    assert "| limit of the machine | 10 (reached: 40%) |" in text
    assert "| gone | failed |" in text and "gone failed: not installed: no compiler" in text and "| none | - |" in text
    compare_report.draw_chart(result(), tmp_path / "compare.png")
    assert (tmp_path / "compare.png").exists()


def test_an_environment_is_made_again_only_where_its_requirements_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(compare_environments, "ROOT", tmp_path)
    monkeypatch.setattr(compare_environments, "CACHE", tmp_path)
    monkeypatch.setattr(compare_environments, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(compare_environments.venv, "create", lambda folder, **fields: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(compare_environments, "_pip", lambda folder, arguments: made.append(arguments))
    (tmp_path / "requirements-toy.txt").write_text("a")
    for _ in range(2):
        assert compare_environments.environment("toy", None) == tmp_path / "toy"
    assert len(made) == 1
    (tmp_path / "requirements-toy-alone.txt").write_text("b")
    compare_environments.environment("toy", None)
    assert [arguments[0] for arguments in made] == ["-r", "-r", "--no-deps"]


def test_every_engine_has_its_files() -> None:
    for engine in compare.ENGINES:
        assert (ROOT / f"benchmarks/peers/{engine.peer}.py").exists()
        assert engine.ours or (ROOT / f"benchmarks/peers/requirements-{engine.place}.txt").exists()


def test_the_result_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/compare.py")])
    config = {"hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 10, "vocab_size": 20}))
    toy = result()
    compare.write(tmp_path, toy["engines"], {"x": LOAD}, toy["runs"], compare_limits.Rates(1e9, 1e9), str(tmp_path))
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["loads"]["x"]["limit_8_bits"] >= written["loads"]["x"]["limit"] > 0
    assert {"runs", "summary", "engines", "command", "commit", "date"} <= written.keys()
    assert (tmp_path / "compare.md").read_text().startswith("| engine |") and (tmp_path / "compare.png").exists()

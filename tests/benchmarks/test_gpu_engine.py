"""benchmarks/gpu_engine.py without a GPU: its cases run at toy sizes, and no case stops the others."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_bench  # noqa: E402
import gpu_engine  # noqa: E402
import gpu_models  # noqa: E402
from gpu_cases import Row  # noqa: E402
from gpu_engine import Case, Group  # noqa: E402

ROW = '{"case": "%s", "how": "", "model": "m", "unit": "ms", "value": 1.0, "limit": 1.0}'


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is one of the facts of a result."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/gpu_engine.py")])


@pytest.fixture(scope="module")
def bench() -> Iterator[gpu_bench.Bench]:
    with gpu_models.checkpoint(gpu_models.QWEN, True, torch.float32) as directory:
        yield gpu_bench.Bench(directory, torch.device("cpu"), gpu_bench.TINY, torch.float32)


CASES = [(group, case) for group in gpu_engine.GROUPS for case in group.cases if group.model == gpu_models.QWEN]


@pytest.mark.parametrize(
    ("group", "case"), CASES, ids=lambda value: f"{value.name}, {value.how}" if isinstance(value, Case) else ""
)
def test_a_case_runs(group: Group, case: Case, bench: gpu_bench.Bench, tmp_path: Path) -> None:
    row = gpu_engine.measured(group, case, bench)
    assert "error" not in row and row["value"] > 0, row
    assert row["limit"] is None or row["limit"] > 0
    assert case.name in gpu_engine.line(row)
    assert not gpu_engine.write(tmp_path, [row], 1)
    assert json.loads((tmp_path / "gpu_engine.json").read_text())["rows"] == [row] and (tmp_path / "gpu_engine.png").exists()


def test_a_case_that_fails_is_told_with_its_error(bench: gpu_bench.Bench, tmp_path: Path) -> None:
    def fails(bench: gpu_bench.Bench) -> Row:
        raise RuntimeError("it broke")

    row = gpu_engine.measured(Group("m", ()), Case("c", "h", fails), bench)
    assert row["error"] == "RuntimeError: it broke" and "failed: RuntimeError: it broke" in gpu_engine.line(row)
    assert gpu_engine.write(tmp_path, [row], 1)


def drive(code: str, rows: Path, seconds: float = 60, patience: float = 60) -> list[Row]:
    """Cases a, b and c, in processes that do what `code` says of those that are not done yet."""
    group = Group("m", tuple(Case(name, "", lambda bench: {}) for name in "abc"))
    script = f"import os, sys, time; rows, done = open({str(rows)!r}, 'a'), len(open({str(rows)!r}).readlines())\n"
    script += f"for name in 'abc'[done:]:\n {code}\n print({ROW!r} % name, file=rows, flush=True)"
    return gpu_engine.drive(group, [sys.executable, "-c", script], rows, time.monotonic() + seconds, patience)


@pytest.mark.parametrize(
    ("code", "patience", "error"),
    [("if name == 'b': os.abort()", 60, "ended with status -6"), ("if name == 'b': time.sleep(60)", 4, "no result in time")],
)
def test_a_case_that_dies_or_hangs_stops_no_other(code: str, patience: float, error: str, tmp_path: Path) -> None:
    rows = drive(code, tmp_path / "rows", patience=patience)
    assert [row["case"] for row in rows] == ["a", "b", "c"]
    assert error in rows[1]["error"] and "error" not in rows[0] and "error" not in rows[2]


def test_a_process_that_can_not_go_on_is_started_again(tmp_path: Path) -> None:
    """A case is measured once: the next process begins with the one after it."""
    rows = drive("time.sleep(0)", tmp_path / "first")
    assert rows == drive("done_before = done", tmp_path / "first") and len(rows) == 3
    rows = drive("if name == 'b' and done == 0: sys.exit(1)", tmp_path / "second")
    assert [row["case"] for row in rows] == ["a", "b", "c"] and "error" not in rows[2]


def test_what_has_no_time_left_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    rows = drive("if name == 'c': time.sleep(60)", tmp_path / "rows", seconds=4)
    assert time.monotonic() - begin < 30 and len(rows) == 2
    assert not gpu_engine.write(tmp_path, rows, 3)
    assert "1 of 3 cases were left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", [gpu_models.QWEN, gpu_models.LLAMA])
def test_checkpoints_are_what_transformers_makes_of_their_configuration(name: str) -> None:
    with gpu_models.checkpoint(name, True, torch.bfloat16) as directory:
        lm, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(loading.values()), loading
        config = gpu_models.outline(directory)
    assert not directory.exists()
    assert gpu_models.weight_bytes(config, torch.bfloat16) == 2 * sum(
        weight.numel() for key, weight in lm.named_parameters() if config.tie_word_embeddings or "embed" not in key
    )
    assert lm.model.layers[1].mlp.up_proj.weight.float().std().item() == pytest.approx(gpu_models.SPREAD, rel=0.1)


@pytest.mark.parametrize(("name", "billions"), [(gpu_models.QWEN, 0.596), (gpu_models.LLAMA, 8.030)])
def test_sizes_are_those_of_the_models_they_are_named_after(name: str, billions: float, tmp_path: Path) -> None:
    """Parameters as their authors count them."""
    (tmp_path / "config.json").write_text(json.dumps(gpu_models.CONFIGS[name] | {"dtype": "bfloat16"}))
    shapes = gpu_models.expected_shapes(gpu_models.outline(tmp_path))
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(billions, abs=0.001)
    assert gpu_models._size(gpu_models.CONFIGS[name], torch.bfloat16) / 2e9 == pytest.approx(billions, abs=0.01)

"""`pagefork bench latency`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.cli import assert_refused, pagefork


def test_percentiles_are_those_of_the_latencies_that_count(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    load = ["--batch-size", "2", "--input-len", "8", "--output-len", "5", "--num-iters", "4", "--num-iters-warmup", "1"]
    done = pagefork("bench", "latency", *load, "--output-json", str(file))
    assert (done.code, done.stderr) == (0, "")
    found = json.loads(file.read_text())
    latencies = found["latencies"]
    assert len(latencies) == 4
    assert found["avg_latency"] == pytest.approx(np.mean(latencies))
    for percent, value in found["percentiles"].items():
        assert value == pytest.approx(np.percentile(latencies, int(percent)))
    # both outputs of a batch end with it: five tokens are one first and four others
    assert found["mean_ttft_ms"] + 4 * found["mean_itl_ms"] == pytest.approx(1000 * np.mean(latencies))
    shown = re.search(r"batch latency +ms +mean +([\d.]+) +median +([\d.]+) +p90 +([\d.]+) +p99 +([\d.]+)\n", done.stdout)
    assert shown
    assert float(shown[1]) == pytest.approx(found["avg_latency"] * 1000, abs=0.006)
    assert found["machine"]["threads"] >= 1


def test_outputs_of_one_token_have_no_inter_token_latency(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    load = ["--batch-size", "1", "--output-len", "1", "--num-iters", "1", "--num-iters-warmup", "0"]
    done = pagefork("bench", "latency", *load, "--output-json", str(file))
    assert done.code == 0
    assert "none" in done.stdout
    assert not [name for name in json.loads(file.read_text()) if "itl" in name]


def test_a_load_that_cannot_be_run_is_refused() -> None:
    assert_refused(pagefork("bench", "latency", "--num-iters", "0"), "num_iters=0")
    assert_refused(pagefork("bench", "latency", "--input-len", "2000"), "2000 + 128", "1024")

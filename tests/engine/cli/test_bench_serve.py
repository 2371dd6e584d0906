"""`pagefork bench serve`: a served engine, a gateway before it, and a server that does what it should not."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import COMMAND, Done, assert_refused, pagefork
from support.gateway import Pair, engine, gateway

from pagefork import LLM, SamplingParams
from pagefork.cli.serving_load import arrivals, random_asks
from pagefork.server.launch import Served

SHORT = ["--num-prompts", "6", "--random-input-len", "12", "--random-output-len", "40"]  # several deltas
PROMPTS = ["def f(", "import os\n", "class Queue:\n    def"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with engine() as found:
        yield found


@pytest.fixture(scope="module")
def pair(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with gateway(served, tmp_path_factory.mktemp("gateway")) as found:
        yield found


def bench(*flags: str, **environment: str) -> Done:
    return pagefork("bench", "serve", "--disable-tqdm", *flags, **environment)


def measured(folder: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    """What is saved, with the details."""
    done = bench("--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", "r.json", *flags)
    assert done.code == code, done.stderr
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return found


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "max_tokens": 40}) + "\n" for prompt in PROMPTS))
    return file


def test_arrivals_have_the_rate_and_the_burstiness_that_were_asked_for() -> None:
    for burstiness in (0.25, 1.0, 16.0):
        times = arrivals(np.random.default_rng(0), 40_000, 8.0, burstiness)
        gaps = np.diff([0.0, *times])
        assert times[-1] == pytest.approx(40_000 / 8)
        # of a gamma distribution of this shape
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.03)
    assert arrivals(np.random.default_rng(0), 3, None, 1.0) == [0, 0, 0]


def test_arrivals_of_burstiness_1_are_a_poisson_process() -> None:
    times = arrivals(np.random.default_rng(1), 50_000, 5.0, 1.0)
    counts = np.histogram(times, bins=np.arange(0, times[-1]))[0]
    share = [float(np.mean(counts == count)) for count in range(12)]
    expected = np.cumprod([1.0, *(5.0 / count for count in range(1, 12))]) * np.exp(-5.0)
    assert share == pytest.approx(expected, abs=0.01)


def test_random_prompts_share_a_prefix_and_their_lengths_lie_around_what_was_asked_for() -> None:
    asks = random_asks(np.random.default_rng(2), 2000, 50, (100, 10), 7, 0.2)
    assert len({tuple(ask.prompt[:7]) for ask in asks}) == 1
    assert len({tuple(ask.prompt[7:]) for ask in asks}) == 2000
    assert {len(ask.prompt) - 7 for ask in asks} == set(range(80, 121))
    assert {ask.output_len for ask in asks} == {8, 9, 10, 11, 12}
    assert {token for ask in asks for token in ask.prompt} == set(range(50))
    assert asks == random_asks(np.random.default_rng(2), 2000, 50, (100, 10), 7, 0.2)


def test_the_numbers_follow_from_the_times_of_every_request(served: Served, tmp_path: Path) -> None:
    goals = ["--goodput", "ttft:30 e2el:60", "--goodput", "tpot:20"]
    flags = ["--metric-percentiles", "10,75,99.9", "--num-warmups", "2", *goals, "--metadata", "purpose=test"]
    found = measured(tmp_path, "--address", served.endpoint, *SHORT, *flags)
    assert (found["completed"], found["failed"], found["failures"]) == (6, 0, {})
    assert found["metadata"] == {"purpose": "test"}
    assert found["input_lens"] == [12] * 6 and found["output_lens"] == [40] * 6
    assert found["output_throughput"] == pytest.approx(240 / found["duration"])
    assert found["total_token_throughput"] == pytest.approx(312 / found["duration"])
    ttfts, e2els, itls = found["ttfts"], found["e2els"], found["itls"]
    tpots = [(e2el - ttft) / 39 for e2el, ttft in zip(e2els, ttfts, strict=True)]
    for name, values in {"ttft": ttfts, "e2el": e2els, "itl": [*chain(*itls)], "tpot": tpots}.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(1000 * np.mean(values))
        assert found[f"median_{name}_ms"] == pytest.approx(1000 * np.median(values))
        assert found[f"std_{name}_ms"] == pytest.approx(1000 * np.std(values))
        for point in (10, 75, 99.9):
            assert found[f"p{point}_{name}_ms"] == pytest.approx(1000 * np.percentile(values, point))
    for ttft, gaps, e2el in zip(ttfts, itls, e2els, strict=True):
        assert ttft > 0 and 1 <= len(gaps) <= 39 and ttft + sum(gaps) <= e2el
    times = zip(ttfts, e2els, tpots, strict=True)
    good = [ttft <= 0.03 and e2el <= 0.06 and tpot <= 0.02 for ttft, e2el, tpot in times]
    assert found["request_goodput"] == pytest.approx(sum(good) / found["duration"])
    assert found["machine"]["python"]


def test_what_is_measured_is_what_the_engine_writes(
    served: Served, pair: Pair, prompt_file: Path, tmp_path: Path, demo: LLM
) -> None:
    """Over both transports."""
    greedy = ["--dataset-name", "custom", "--dataset-path", str(prompt_file), "--temperature", "0"]
    expected = demo.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    for target in (["--address", served.endpoint], ["--backend", "openai", "--base-url", pair.url]):
        found = measured(tmp_path, *target, *greedy)
        assert found["generated_texts"] == [output.outputs[0].text for output in expected]
        assert found["output_lens"] == [len(output.outputs[0].token_ids) for output in expected]
        assert found["input_lens"] == [len(output.prompt_token_ids) for output in expected]
        assert found["model_id"] == "demo" and len(found["ttfts"]) == 3 and all(found["itls"])


def test_no_more_requests_run_at_once_than_allowed(served: Served, tmp_path: Path) -> None:
    found = measured(tmp_path, "--address", served.endpoint, *SHORT, "--max-concurrency", "2")
    times = [(start, start + e2el) for start, e2el in zip(found["start_times"], found["e2els"], strict=True)]
    assert max(sum(begin <= start < end for begin, end in times) for start, _ in times) == 2 == found["max_concurrent_requests"]


def test_requests_are_sent_at_their_times(served: Served, tmp_path: Path) -> None:
    found = measured(tmp_path, "--address", served.endpoint, *SHORT, "--request-rate", "30", "--burstiness", "1000")
    assert np.median(np.diff(found["start_times"])) == pytest.approx(1 / 30, abs=0.02)
    assert found["duration"] > 6 / 30
    assert measured(tmp_path, "--address", served.endpoint, *SHORT, "--request-rate", "inf")["request_rate"] == "inf"


@pytest.mark.parametrize(
    "flags",
    [
        ["beam", "--beam-width", "3", "--n", "2"],
        ["contrastive", "--alpha", "0.4", "--top-k", "3"],
        ["mcts", "--num-simulations", "4", "--value-fn", "brackets_balance"],
    ],
)
def test_searches_are_measured_too(served: Served, tmp_path: Path, flags: list[str]) -> None:
    found = measured(tmp_path, "--address", served.endpoint, *SHORT, "--strategy", *flags)
    assert found["completed"] == 6
    assert found["output_lens"] == [40 * found["sampling"].get("n", 1)] * 6
    assert all(ttft <= e2el for ttft, e2el in zip(found["ttfts"], found["e2els"], strict=True))


def test_failures_are_counted_by_code_and_in_no_other_number(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt_token_ids": [4096]}\n\n{"prompt_token_ids": [5, 9999], "max_tokens": 2}\n')
    flags = ["--address", served.endpoint, "--dataset-name", "custom", "--dataset-path", str(file), "--custom-output-len", "3"]
    found = measured(tmp_path, *flags, "--ignore-eos")
    assert (found["completed"], found["failed"], found["failures"]) == (1, 2, {"INVALID_ARGUMENT": 2})
    assert found["total_output_tokens"] == 3 and found["errors"][0] == "" and "4096" in found["errors"][1]
    shown = bench(*flags, "--ignore-eos").stdout
    assert "2 requests failed: INVALID_ARGUMENT: " in shown and "1 requests, " in shown


def test_an_interrupted_run_reports_what_had_ended(served: Served) -> None:
    load = ["--num-prompts", "400", "--max-concurrency", "1", "--random-input-len", "8", "--random-output-len", "8"]
    command = [*COMMAND, "bench", "serve", "--address", served.endpoint, *load]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while not re.search(r" ([5-9]|\d\d+)/400", said):  # not every number is shown
            more = process.stderr.read(1)
            assert more, said
            said += more
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.endswith("pagefork: interrupted\n")
    ended = int(out.split(" requests, ")[0])
    assert 5 <= ended < 400 and f"{8 * ended} output tokens" in out and "time to first token" in out


def test_a_plot_is_drawn(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "times.png"
    assert bench("--address", served.endpoint, *SHORT, "--plot", str(file)).code == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert_refused(bench("--plot", str(tmp_path / "times.xyz")), "times.xyz", "png")


def test_the_default_name_of_a_result_says_what_it_is_of(served: Served, tmp_path: Path) -> None:
    done = bench(
        "--address", served.endpoint, *SHORT, "--save-result", "--result-dir", str(tmp_path / "new"), "--max-concurrency", "3"
    )
    [file] = (tmp_path / "new").iterdir()
    assert file.name.startswith("zmq-infqps-concurrency3-demo-20") and str(file) in done.stdout
    assert "ttfts" not in json.loads(file.read_text())


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """Its URL. Every completion is answered by `answer`, after which the connection is closed."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "other"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}"
        finally:
            found.shutdown()
            thread.join()


def events(*objects: object) -> Answer:
    """An answer of these events; [DONE] only where it is one of them."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for event in objects:
            handler.wfile.write(b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\r\n\r\n")

    return answer


def refusing(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(429)
    handler.end_headers()
    handler.wfile.write(b'{"error": {"message": "too many", "code": "queue_full"}}')


def text(*parts: str) -> dict[str, Any]:
    return {"choices": [{"index": at, "text": part} for at, part in enumerate(parts)]}


def test_tokens_that_come_together_are_one_arrival(tmp_path: Path) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 5}}
    with server(events(text("abc"), text(""), text("d"), usage, b"[DONE]")) as url:
        found = measured(tmp_path, "--backend", "openai", "--base-url", url, "--num-prompts", "1", "--random-input-len", "12")
    assert found["generated_texts"] == ["abcd"]
    assert len(found["itls"][0]) == 1
    assert found["output_lens"] == [5]
    assert found["mean_tpot_ms"] == pytest.approx(1000 * (found["e2els"][0] - found["ttfts"][0]) / 4)


def test_outputs_of_one_request_have_gaps_of_their_own(tmp_path: Path) -> None:
    with server(events(text("a", "b"), text("c", "d"), b"[DONE]")) as url:
        found = measured(tmp_path, "--backend", "openai", "--base-url", url, "--num-prompts", "1", "--n", "2")
    assert len(found["itls"][0]) == 2 and found["output_lens"] == [4] and found["generated_texts"] == ["ac"]


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (events(text("a")), "ENGINE_LOST"),
        (events(text("a"), {"error": {"message": "gone", "code": "step_failed"}}), "STEP_FAILED: gone"),
        (refusing, "QUEUE_FULL: too many"),
    ],
)
def test_an_answer_over_http_that_breaks_off_is_a_failure(answer: Answer, failure: str) -> None:
    with server(answer) as url:
        done = bench("--backend", "openai", "--base-url", url, "--num-prompts", "2")
    assert done.code == 2 and done.stderr == "pagefork: no request was answered\n"
    assert f"2 requests failed: {failure}" in done.stdout


def test_a_service_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert_refused(bench("--address", f"ipc://{tmp_path}/none"), "ENGINE_LOST", "none")
    assert_refused(bench("--backend", "openai", "--port", "1"), "127.0.0.1:1")
    assert_refused(bench("--backend", "openai", "--base-url", "nonsense"), "nonsense")


def test_a_load_that_the_service_has_no_use_for_is_refused(served: Served, pair: Pair) -> None:
    assert_refused(bench("--address", served.endpoint, "--random-input-len", "1020"), "1020 + 64", "1024")
    assert_refused(bench("--address", served.endpoint, "--model", "other"), "'other'", "'demo'")
    assert_refused(bench("--backend", "openai", "--base-url", pair.url, "--model", "other"), "'other'", "demo")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--nonsense"], ["--nonsense"]),
        (["--num-prompts", "0"], ["num_prompts=0"]),
        (["--dataset-name", "custom"], ["dataset_path"]),
        (["--dataset-name", "custom", "--dataset-path", "/dev/null"], ["/dev/null", "0 prompts"]),
        (["--dataset-path", "x"], ["dataset_path", "custom"]),
        (["--request-rate", "-1"], ["request_rate=-1"]),
        (["--request-rate", "nan"], ["request_rate=nan"]),
        (["--burstiness", "2"], ["burstiness=2", "request_rate"]),
        (["--goodput", "itl:3"], ["'itl:3'", "ttft, tpot, e2el"]),
        (["--goodput", "ttft:soon"], ["'ttft:soon'"]),
        (["--percentile-metrics", "ttft,speed"], ["'speed'", "itl"]),
        (["--metric-percentiles", "50,101"], ["50,101"]),
        (["--metadata", "x=1"], ["metadata", "save_result"]),
        (["--save-result", "--metadata", "x"], ["'x'", "KEY=VALUE"]),
        (["--port", "80"], ["port", "openai"]),
        (["--backend", "openai", "--address", "a"], ["address", "zmq"]),
        (["--backend", "openai", "--base-url", "http://h", "--port", "80"], ["base_url", "port"]),
        (["--backend", "openai", "--extra-body", "[]"], ["extra_body"]),
        (["--backend", "openai", "--strategy", "beam"], ["strategy=beam", "zmq"]),
        (["--strategy", "beam", "--top-p", "0.5"], ["top_p"]),
        (["--value-fn", "brackets_balance"], ["value_fn", "MCTSParams"]),
        (["--address", "a/b"], ["a/b"]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(flags: list[str], named: list[str]) -> None:
    assert_refused(bench(*flags), *named)


def test_a_client_computes_nothing_and_imports_no_torch() -> None:
    names = ["bench_serve", "serving_flags", "serving_load", "serving_report", "serving_targets"]
    lines = [f"from pagefork.cli import {', '.join(names)}", "from pagefork import AsyncClient", "import sys"]
    code = "\n".join([*lines, "print('torch' in sys.modules)"])
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""`pagefork serve` and `pagefork keys`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.cli import COMMAND, ENVIRONMENT, Done, assert_refused, pagefork
from support.dealer import Dealer, alive, eventually

from pagefork import SamplingParams
from pagefork.endpoint import find
from pagefork.server.keys import read_key_pair

SMALL = ["--num-blocks", "200", "--max-model-len", "512", "--log-level", "warning"]
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SECONDS = 60.0


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    monkeypatch.setenv("PAGEFORK_RUNTIME_DIR", str(folder))
    monkeypatch.delenv("PAGEFORK_TOKEN", raising=False)
    return folder


@contextmanager
def serving(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A supervisor that has said where clients connect; nothing of it is left."""
    environment = {**ENVIRONMENT, "PAGEFORK_RUNTIME_DIR": os.environ["PAGEFORK_RUNTIME_DIR"]}
    process = subprocess.Popen(
        [*COMMAND, "serve", *SMALL, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def children(process: subprocess.Popen[str]) -> list[int]:
    """By their age: the engine, and the gateway."""
    return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def test_an_engine_and_its_gateway_end_what_they_accepted_when_they_are_told_to_stop() -> None:
    with serving("demo", "--name", "mine", "--http", "127.0.0.1:0") as process:
        assert line(process) == f"pagefork: demo is served as mine at {find('mine').endpoint}\n"
        url = re.fullmatch(r"pagefork: the OpenAI API is at (http://127\.0\.0\.1:\d+)\n", line(process))
        assert url is not None
        models = json.loads(urllib.request.urlopen(f"{url[1]}/v1/models", timeout=SECONDS).read())
        assert [model["id"] for model in models["data"]] == ["demo"]
        pids = children(process)
        assert len(pids) == 2
        with Dealer(find("mine").endpoint) as dealer:
            dealer.hello()
            rid = dealer.submit("def f(", LONG)
            process.send_signal(signal.SIGINT)
            finished, tokens = dealer.finish(rid)
            assert finished.error is None and len(tokens[0]) == 200
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out, err) == (0, "", "")
        assert not any(map(alive, pids))


@pytest.mark.parametrize(("victim", "named"), [(0, "engine"), pytest.param(1, "gateway", marks=pytest.mark.long)])
def test_when_one_of_the_two_dies_the_other_is_ended_and_one_line_says_so(victim: int, named: str) -> None:
    with serving("demo", "--http", "127.0.0.1:0") as process:
        line(process), line(process)
        pids = children(process)
        os.kill(pids[victim], signal.SIGKILL)
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode != 0
        assert err.splitlines()[-1] == f"pagefork: the {named} has died: killed by SIGKILL"
        assert not any(map(alive, pids))


@pytest.mark.long
def test_all_end_when_the_supervisor_is_killed() -> None:
    with serving("--http", "127.0.0.1:0") as process:
        line(process), line(process)
        pids = children(process)
        process.kill()
        eventually(lambda: not any(map(alive, pids)), 5.0, "the children are gone")


def test_a_second_signal_does_not_wait() -> None:
    with serving("--drain-timeout", "600") as process:
        line(process)
        [pid] = children(process)
        with Dealer(find("default").endpoint) as dealer:
            dealer.hello()
            rid = dealer.submit("def f(", LONG.replace(max_tokens=500), credit=1, stream=True)
            dealer.get(object)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=SECONDS)
            assert time.monotonic() - began < 10.0, rid
        assert not alive(pid)


def test_what_an_engine_cant_start_for_is_one_line() -> None:
    done = subprocess.run([*COMMAND, "serve", "no/such/model/here"], capture_output=True, text=True, timeout=SECONDS)
    assert_refused(Done(done.returncode, done.stdout, done.stderr), "no/such/model/here", "there is no such directory")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--http", "8000"], ["http='8000'", "HOST:PORT"]),
        (["--http", "127.0.0.1:65536"], ["below 65536"]),
        (["--http", "0.0.0.0:0"], ["API key"]),
        (["--max-calls", "3"], ["max_calls", "--http"]),
        (["--http", "127.0.0.1:0", "--key-file", "x"], ["key_file and curve_secret_key go together"]),
        (["--max-beam-width", "0"], ["max_beam_width=0"]),
        (["--drain-timeout", "-1"], ["drain_timeout=-1"]),
        (["--max-num-seqs", "0"], ["max_num_seqs=0"]),
    ],
)
def test_settings_that_can_not_be_are_refused_before_anything_starts(arguments: list[str], named: list[str]) -> None:
    assert_refused(pagefork("serve", *arguments), *named)


def test_the_variables_that_are_no_flags_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFORK_TOKEN", "secret")
    monkeypatch.setenv("PAGEFORK_API_KEY", "secret")
    assert_refused(pagefork("serve", "--http", "8000"), "HOST:PORT")


def test_keys_are_made_once_and_the_secret_one_is_its_owners_alone(tmp_path: Path) -> None:
    done = pagefork("keys", "new", "--out", str(tmp_path / "keys"), "--name", "engine")
    public, secret = tmp_path / "keys/engine.key", tmp_path / "keys/engine.key_secret"
    assert (done.code, done.stderr) == (0, "")
    assert str(public) in done.stdout and str(secret) in done.stdout
    pair = read_key_pair(secret)
    assert pair.public in public.read_bytes() and pair.secret not in public.read_bytes()
    assert pair.secret.decode() not in done.stdout
    assert secret.stat().st_mode & 0o777 == 0o600
    assert_refused(pagefork("keys", "new", "--out", str(tmp_path / "keys"), "--name", "engine"), "engine.key", "not overwritten")
    assert_refused(pagefork("keys", "new", "--out", str(tmp_path), "--name", "../x"), "'../x'")
    assert read_key_pair(secret) == pair


def test_a_gateway_whose_packages_are_not_installed_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_refused(pagefork("serve", "--http", "127.0.0.1:0"), "http needs uvicorn", "pip install 'pagefork[http]'")

"""Processes that their parents configure and outlive: small ones, and a served engine."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.dealer import Dealer, alive, eventually
from support.serving_process import configured, serving

from pagefork import ConfigError, MCTSParams, ModelError, PageforkError, SamplingParams
from pagefork.server.launch import Child, LaunchError, Served
from pagefork.wire import MAX_FRAME, Code, Error, Finished, GoAway

SECONDS = 60.0


class Settings(msgspec.Struct):
    text: str = ""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Any]:
    """Starts a module, given as source, as a child."""
    started: list[Child] = []

    def start(source: str, config: msgspec.Struct | None = None, **options: Any) -> Child:
        (tmp_path / "child_module.py").write_text(textwrap.dedent(source))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        made = Child("the child", "child_module", config or Settings(), environment=environment, **options)
        started.append(made)
        return made

    yield start
    for made in started:
        made.signal(signal.SIGKILL)
        made.process.wait()
        made.close()


PARENT = """
import os, subprocess, sys, time
import msgspec
from pagefork.server.child import Parent
class Settings(msgspec.Struct):
    text: str = ""
parent = Parent()
settings = parent.read(Settings)
"""


def test_closed_standard_streams_are_opened_before_anything_else_gets_their_numbers() -> None:
    source = """
        import os
        from pagefork.server.child import hold_standard_streams
        os.close(2)
        hold_standard_streams()
        print(os.readlink("/proc/self/fd/2"), os.open("/", os.O_RDONLY))
    """
    done = subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[0] == os.devnull and int(done.stdout.split()[1]) > 2


def test_a_child_gets_its_configuration_and_tells_when_it_is_ready(child: Any) -> None:
    made = child(PARENT + "print('noise')\nparent.tell(text=settings.text[::-1], size=len(settings.text))\ntime.sleep(60)")
    assert made.ready(SECONDS) == {"text": "", "size": 0}
    text = "line\nline é \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") * 10_000
    made = child(PARENT + "parent.tell(text=settings.text[::-1][:5], size=len(settings.text))", Settings(text))
    assert made.ready(SECONDS) == {"text": text[::-1][:5], "size": len(text)}


def test_a_child_that_has_an_error_to_tell_raises_it_in_its_parent(child: Any) -> None:
    with pytest.raises(ModelError, match="no such thing"):
        child(PARENT + "parent.tell(error='no such thing', kind='ModelError')").ready(SECONDS)
    with pytest.raises(PageforkError, match="no such thing"):
        child(PARENT + "parent.tell(error='no such thing', kind='SystemExit')").ready(SECONDS)


def test_a_child_that_ends_without_a_word_is_an_error_that_tells_how(child: Any) -> None:
    with pytest.raises(LaunchError, match="the child ended before it was ready: exit code 7"):
        child("import os; os._exit(7)").ready(SECONDS)
    with pytest.raises(LaunchError, match="killed by SIGKILL"):
        child(PARENT + "os.kill(os.getpid(), 9)").ready(SECONDS)
    with pytest.raises(TimeoutError, match=r"the child was not ready after 0\.2 seconds"):
        child(PARENT + "time.sleep(60)").ready(0.2)


def test_a_child_ends_when_its_parent_lets_go_whatever_it_is_at(child: Any) -> None:
    """Also when it started a process that lives on, and when its last words take too long."""
    source = (
        PARENT
        + """
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    parent.watch(lambda: time.sleep(0) if settings.text else os.write(2, b"last words"))
    parent.tell(sleeper=sleeper.pid)
    while True:
        sum(range(10_000_000))  # in the middle of a long step
    """
    )
    made = child(textwrap.dedent(PARENT) + textwrap.dedent(source.removeprefix(PARENT)), stderr=subprocess.PIPE)
    sleeper = made.ready(SECONDS)["sleeper"]
    try:
        made._stdin.close()
        assert made.process.wait(5) == 1
        assert made.process.stderr.read(10) == b"last words"
        assert os.read(made.fileno(), 1) == b""  # the sleeper holds neither end
        assert alive(sleeper)
    finally:
        os.kill(sleeper, signal.SIGKILL)
        made.process.stderr.close()


def test_a_configuration_that_is_none_is_told(child: Any) -> None:
    with pytest.raises(ConfigError, match=r"standard input: .*int"):
        child(
            """
            from pagefork.scheduler.errors import ConfigError
            from pagefork.server.child import Parent
            parent = Parent()
            try:
                parent.read(dict[str, int])
            except ConfigError as error:
                parent.tell(error=str(error), kind="ConfigError")
            """
        ).ready(SECONDS)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(configured({"num_blocks": 100}, bind="tcp://127.0.0.1:0", name="far")) as engine:
        yield engine


def test_an_engine_serves_its_own_user_by_its_name(served: Served) -> None:
    assert served.facts["max_model_len"] == 512 and served.exit_code is None
    with Dealer(served.endpoint, served.token) as dealer:
        assert dealer.hello().boot_id == served.boot_id
        finished, tokens = dealer.finish(dealer.submit("def f(", SamplingParams(temperature=0, max_tokens=5)))
        assert finished.error is None and len(tokens[0]) == 5
        dealer.bye()


def test_an_engine_survives_a_frame_above_the_limit(served: Served) -> None:
    with Dealer(served.endpoint, served.token) as bad, Dealer(served.endpoint, served.token) as good:
        bad.hello(), good.hello()
        bad.socket.send(b"x" * (MAX_FRAME + 1))
        assert not bad.socket.poll(300)
        good.submit("x" * (MAX_FRAME // 2 + 1), rid="long")
        error = good.next()
        assert error is not None and error[0].code == Code.TOO_LARGE
        finished, _ = good.finish(good.submit([1, 2, 3], SamplingParams(max_tokens=1)))
        assert finished.error is None
        good.bye()


def test_an_engine_may_have_as_many_connections_as_the_system_allows() -> None:
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    try:
        with serving(configured({"num_blocks": 100}, name="files")) as engine:
            found = resource.prlimit(engine.pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, most))
    assert found == (1 << 16 if most == resource.RLIM_INFINITY else min(most, 1 << 16), most)


def test_an_idle_engine_sleeps(served: Served) -> None:
    def used() -> float:
        fields = Path(f"/proc/{served.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    eventually(lambda: alive(served.pid), 1, "it runs")
    time.sleep(0.3)
    before = used()
    time.sleep(1.0)
    assert used() - before < 0.1


def test_what_an_engine_cant_start_for_is_raised_where_it_was_started(served: Served) -> None:
    with pytest.raises(ConfigError, match=f"'far' runs already .process {served.pid}"):
        Served(configured(name="far")).__enter__()
    with pytest.raises(ConfigError, match="can't listen"):
        Served(configured(name="near", bind=served.endpoint)).__enter__()
    with pytest.raises(ModelError, match="no/such/model"):
        Served(configured({"model": "no/such/model"}, name="near")).__enter__()


VALUES = """
from pagefork.core import LLMEngine

def longest(prompt):
    return lambda leaves: [float(prompt == "def f(") for leaf in leaves]

def leaves(prompt):
    raise SystemExit(1)

def breaks(prompt):
    def step(engine):
        raise MemoryError("planted")
    LLMEngine.step = step
    return longest(prompt)
"""


def test_an_engine_that_fails_says_so_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value functions come from the current directory; one of these breaks the engine that runs it."""
    (tmp_path / "own_values.py").write_text(VALUES)
    monkeypatch.chdir(tmp_path)
    names = ("longest", "leaves", "breaks")
    params = MCTSParams(max_tokens=2, num_simulations=2)
    with serving(configured({"num_blocks": 100}, value_fn=[f"{name}=own_values:{name}" for name in names])) as engine:
        with Dealer(engine.endpoint) as dealer:
            assert dealer.hello().value_functions[-3:] == [*names]
            finished, _ = dealer.finish(dealer.submit("def f(", params.replace(value_fn="longest")))
            assert finished.error is None
            dealer.submit("def f(", params.replace(value_fn="leaves"), rid="left")
            assert dealer.get(Error).code == Code.INVALID_ARGUMENT
            dealer.submit("def f(", params.replace(value_fn="breaks"), rid="lost")
            finished = dealer.get(Finished)
            assert finished.error.code == Code.ENGINE_LOST and "MemoryError: planted" in finished.error.message
            assert "MemoryError: planted" in dealer.get(GoAway).reason
        eventually(lambda: engine.exit_code is not None, 10.0, "the engine has ended")
        assert engine.exit_code == 1

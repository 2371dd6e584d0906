"""A served engine is killed, or its parent is, or it is told to end: what becomes of it and of its requests."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from support.dealer import Dealer, alive, eventually
from support.served_requests import LONG, PROMPT, SHORT, python, streaming
from support.serving_process import configured, serving

from pagefork import Client, ServiceError, wire


def _kill_the_engine() -> None:
    with serving() as engine, Client(engine.endpoint) as client:
        streams = [client.stream(PROMPT, LONG) for _ in range(4)]
        for stream in streams:
            next(iter(stream))
        began = time.monotonic()
        os.kill(engine.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(ServiceError) as caught:
                stream.result()
            assert caught.value.code == wire.Code.ENGINE_LOST
            assert not caught.value.retry_safe, "tokens had come"
        assert time.monotonic() - began < 2.5
        eventually(lambda: not group(engine.pid), 2.0, "no process of the engine's is left")


def group(leader: int) -> list[int]:
    """The processes of a group that are alive."""
    found = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [int(pid) for pid, group, state in rows if int(group) == leader and not state.startswith("Z")]


def test_streams_of_an_engine_that_is_killed_end_with_engine_lost() -> None:
    _kill_the_engine()


@pytest.mark.long
def test_streams_of_an_engine_that_is_killed_end_with_engine_lost_every_time() -> None:
    for _ in range(300):
        _kill_the_engine()


PARENT = """
import sys
from support.serving_process import serving
with serving() as engine:
    print(engine.pid, engine.endpoint, flush=True)
    sys.stdin.read()
"""


def _kill_the_parent() -> None:
    parent = python(PARENT)
    assert parent.stdout is not None
    pid, endpoint = parent.stdout.readline().split()
    with Dealer(endpoint) as dealer:
        dealer.hello()
        streaming(dealer)
        parent.kill()
        parent.wait()
        eventually(lambda: not alive(int(pid)), 5.0, "the engine ends after its parent")
    assert not group(int(pid))
    parent.stdout.close()


def test_an_engine_ends_when_its_parent_is_killed() -> None:
    _kill_the_parent()


@pytest.mark.long
def test_an_engine_ends_when_its_parent_is_killed_every_time() -> None:
    for _ in range(100):
        _kill_the_parent()


def _terminate() -> None:
    """Half of the requests wait for their turn when SIGTERM comes."""
    with serving(configured({"max_num_seqs": 4})) as engine, Dealer(engine.endpoint) as dealer:
        dealer.hello()
        rids = [dealer.submit(PROMPT, LONG.replace(max_tokens=60), stream=n % 2 == 0) for n in range(8)]
        for _ in rids:
            dealer.get(wire.Accepted)
        engine.terminate()
        late = ""
        while not late.startswith("refused"):  # the signal may take its time
            late = dealer.submit(PROMPT, SHORT)
            rids.append(late)
            while (got := dealer.next()) is not None:
                if isinstance(got[0], wire.Error):
                    assert (got[0].rid, got[0].code) == (late, wire.Code.DRAINING)
                    rids.remove(late)
                    late = "refused"
                    break
                if isinstance(got[0], wire.Accepted):
                    break
        found = dict.fromkeys(rids, 0)
        while sum(found.values()) < len(rids):
            finished = dealer.get(wire.Finished)
            found[finished.rid] += 1
            assert finished.error is None
        dealer.get(wire.GoAway)
        assert engine.stop() == 0
        assert set(found.values()) == {1}


def test_sigterm_loses_no_accepted_request() -> None:
    _terminate()


@pytest.mark.long
def test_sigterm_loses_no_accepted_request_ever() -> None:
    for _ in range(100):
        _terminate()

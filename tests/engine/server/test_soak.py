"""Many small requests, aborts and killed clients: afterwards the engine's process holds what it held before."""

from __future__ import annotations

import random
import time

import pytest
from support.dealer import Dealer, eventually, held, probe, resident
from support.serving_process import GONE_WITHIN, configured, serving

from pagefork import SamplingParams, wire
from pagefork.server.launch import Served

AT_ONCE = 16


class Soak:
    """Requests of one to four tokens, each client with several under way."""

    def __init__(self, engine: Served, seed: int = 0) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.ended = 0

    def run(self, requests: int, kills: int) -> None:
        """A tenth is aborted; so many clients leave without a word in the middle of their requests."""
        goal = self.ended + requests
        per_kill = requests // kills if kills else requests
        while self.ended < goal:
            with Dealer(self.engine.endpoint) as dealer:
                dealer.hello()
                self._requests(dealer, min(per_kill, goal - self.ended), left_behind=4 if kills else 0)

    def _requests(self, dealer: Dealer, count: int, left_behind: int) -> None:
        open_, sent = set[str](), 0
        while sent < count or open_:
            while sent < count and len(open_) < AT_ONCE:
                params = SamplingParams(
                    max_tokens=self.rng.randint(1, 4), n=self.rng.choice([1, 1, 1, 2]), seed=self.rng.randrange(99)
                )
                prompt = [5, 6, 7, *(self.rng.randrange(20, 200) for _ in range(self.rng.randrange(6)))]
                rid = dealer.submit(prompt, params, stream=self.rng.random() < 0.7)
                open_.add(rid)
                sent += 1
                if self.rng.random() < 0.1:
                    dealer.send(wire.Abort(rid=rid))
            if sent >= count and len(open_) <= left_behind:
                self.ended += len(open_)
                return
            message = dealer.get(wire.Finished, wire.Error)
            code = message.code if isinstance(message, wire.Error) else message.error and message.error.code
            assert code in (None, wire.Code.CANCELLED), message
            open_.remove(message.rid)
            self.ended += 1
        if not left_behind:
            dealer.bye()

    def settled(self) -> dict[str, int]:
        """What the process holds when nothing is under way."""
        with Dealer(self.engine.endpoint) as dealer:
            dealer.hello()

            def empty() -> bool:
                stats = dealer.stats()
                engine, service = stats.engine, stats.service
                here = (engine.num_running, engine.num_waiting, service.requests, service.reserved_tokens, service.sessions)
                return here == (0, 0, 0, 0, 1) and engine.free_blocks == engine.num_blocks

            eventually(empty, GONE_WITHIN + 3.0, "nothing is under way")
            dealer.bye()
        time.sleep(0.3)  # until its connection is closed there, too
        return held(self.engine.pid)


def soak(requests: int, kills: int) -> None:
    with serving(configured({"num_blocks": 64})) as engine:
        run = Soak(engine)
        run.run(200, 2)
        before = run.settled()
        run.run(requests, kills)
        assert run.settled() == before
        assert probe(engine.endpoint) < 1.0


def memory(requests: int, kills: int, slope: int) -> None:
    """slope: bytes for each request. Two sequences at once: linear layers keep something for each size of batch they meet."""
    with serving(configured({"num_blocks": 16, "max_num_seqs": 2, "max_model_len": 128})) as engine:
        run = Soak(engine)
        run.run(150, 2)
        before = resident(engine.pid)
        run.run(requests, kills)
        assert resident(engine.pid) - before < (1 << 20) + slope * requests


def test_two_thousand_requests_leave_nothing_behind() -> None:
    soak(2000, 20)


def test_requests_take_no_memory_once_they_have_ended() -> None:
    memory(400, 4, slope=1000)


@pytest.mark.long
def test_a_hundred_thousand_requests_leave_nothing_behind() -> None:
    soak(100_000, 1000)


@pytest.mark.long
def test_many_requests_take_no_memory_once_they_have_ended() -> None:
    memory(20_000, 200, slope=100)

"""A socket that speaks the protocol, and a served engine's process seen from outside."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from pagefork import wire
from pagefork.scheduler.params import CommonParams

SECONDS = 30.0  # that an answer may take on a machine that does much else
_PING = 0.2  # seconds between pings, while somebody waits for messages


class Dealer:
    """One connection. `read_hwm`: messages that its socket takes in that nobody read."""

    _names = itertools.count()

    def __init__(self, endpoint: str, token: str | None = None, read_hwm: int = 1000) -> None:
        self._context = zmq.Context.instance()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = read_hwm
        self.socket.connect(endpoint)
        self._token = token
        self._pinged = time.monotonic()
        self._welcome = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close(0)

    def bye(self) -> None:
        """Say that the session is over, and see to it that this is sent."""
        self.send(wire.Bye())
        self.socket.close(1000)

    def hello(self, session: bytes | None = None) -> wire.Welcome:
        self.send(wire.Hello(token=self._token, session=session))
        welcome: wire.Welcome = self.get(wire.Welcome)
        self._welcome = True
        return welcome

    def send(self, message: wire.ClientMessage, blob: bytes | None = None) -> None:
        self.socket.send_multipart(wire.encode(message, blob))

    def submit(self, prompt: str | list[int], params: CommonParams | None = None, rid: str | None = None, **fields: Any) -> str:
        """Send a request; its name."""
        rid = rid or f"d{next(self._names)}"
        text, blob = (prompt, None) if isinstance(prompt, str) else (None, wire.encode_tokens(prompt))
        fields = {"credit": 2**31 - 1, **fields}
        self.send(wire.Submit(rid=rid, text=text, params=wire.encode_params(params), **fields), blob)
        return rid

    def ping(self) -> None:
        """Say that this client is there, if it has not said so for a while."""
        now = time.monotonic()
        if self._welcome and now - self._pinged > _PING:
            self._pinged = now
            self.send(wire.Ping())

    def next(self, seconds: float = SECONDS) -> tuple[Any, bytes | None] | None:
        """The next message that is no Pong; None where none comes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) >= 0:
            self.ping()
            if self.socket.poll(int(min(left, _PING) * 1000)):
                found = wire.decode_from_engine(self.socket.recv_multipart())
                if not isinstance(found[0], wire.Pong):
                    return found
        return None

    def get(self, *kinds: type[Any], rid: str | None = None, seconds: float = SECONDS) -> Any:
        """The next message of these kinds, and of a request; others are skipped."""
        deadline = time.monotonic() + seconds
        while (found := self.next(max(0.0, deadline - time.monotonic()))) is not None:
            message = found[0]
            if isinstance(message, kinds) and (rid is None or getattr(message, "rid", None) == rid):
                return message
        raise AssertionError(f"no {' or '.join(kind.__name__ for kind in kinds)} within {seconds} s")

    def finish(self, rid: str, seconds: float = SECONDS) -> tuple[wire.Finished, list[list[int]]]:
        """The terminal of a request, and the tokens of its outputs."""
        deadline = time.monotonic() + seconds
        tokens: dict[int, list[int]] = {}
        while (found := self.next(max(0.0, deadline - time.monotonic()))) is not None:
            message = found[0]
            if isinstance(message, wire.Error):
                raise AssertionError(f"refused: {message}")
            if isinstance(message, wire.Deltas):
                for delta in message.deltas:
                    if delta.rid == rid:
                        grow(tokens, delta)
            if isinstance(message, wire.Finished) and message.rid == rid:
                for final in message.outputs:
                    grow(tokens, final)
                return message, [tokens[final.index] for final in message.outputs]
        raise AssertionError(f"no end of {rid} within {seconds} s")

    def stats(self) -> wire.StatsReply:
        self.send(wire.Stats())
        reply: wire.StatsReply = self.get(wire.StatsReply)
        return reply


def grow(tokens: dict[int, list[int]], part: wire.Delta | wire.Final) -> None:
    """What came of an output, contiguous."""
    have = tokens.setdefault(part.index, [])
    assert part.start == len(have), f"tokens from {part.start} after {len(have)}"
    have += part.tokens


def probe(endpoint: str, token: str | None = None, seconds: float = SECONDS) -> float:
    """Seconds that a small request takes."""
    from pagefork import SamplingParams

    with Dealer(endpoint, token) as dealer:
        dealer.hello()
        began = time.monotonic()
        finished, tokens = dealer.finish(dealer.submit([1, 2, 3], SamplingParams(max_tokens=1, temperature=0)), seconds)
        assert finished.error is None and len(tokens[0]) == 1
        took = time.monotonic() - began
        dealer.bye()
        return took


def eventually(reached: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until something is so; how long that took."""
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def held(pid: int) -> dict[str, int]:
    """Descriptors, threads and children of a process."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    children: Sequence[str] = [child for task in tasks for child in (task / "children").read_text().split()]
    return {"descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())), "threads": len(tasks), "children": len(children)}


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096

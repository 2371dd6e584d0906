"""Client: an engine in another process, for programs that wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, overload

from pagefork.outputs import RequestOutput
from pagefork.scheduler.errors import ServiceError
from pagefork.scheduler.params import CommonParams
from pagefork.wire import Ping, Pong, Stats, StatsReply

from .base import Base, deliver
from .prompts import Prompt, Submission
from .stream import Mailbox, Stream


class Client(Base):
    """A client of an engine that `pagefork serve` runs. Any number of threads may use it.

        with Client() as client:
            for delta in client.stream("def main("):
                print(delta.text, end="")

    address: an engine's name, or its endpoint (ipc://..., tcp://...). token: what the engine asks for on TCP; None: that of
    the environment, or the one that the engine left for its own user. server_key, key: for CURVE, the files with the
    engine's public key and with this client's own keys (see `pagefork keys`). name: for the engine's logs. session: of an
    earlier client whose requests this one goes on with. connect_timeout: seconds that a request waits for a connection.
    reconnect_timeout: seconds in which a broken connection may come back before its requests are given up. window: tokens
    of each output that the engine may be ahead of the reader.

    Errors of the engine are ServiceErrors. When it is lost, the requests under way end with ENGINE_LOST, and
    the client connects to the next one of that address by itself.
    """

    def __init__(
        self,
        address: str = "default",
        *,
        token: str | None = None,
        server_key: str | None = None,
        key: str | None = None,
        name: str = "",
        session: bytes | None = None,
        connect_timeout: float = 10.0,
        reconnect_timeout: float = 1.5,
        window: int = 256,
    ) -> None:
        """Connect. Raises ServiceError when that is refused or takes longer than `connect_timeout`."""
        super().__init__(deliver, address, token, server_key, key, name, session, connect_timeout, reconnect_timeout, window)
        try:
            self._ask(None).result()
        except BaseException:
            self.close()
            raise

    @overload
    def generate(
        self,
        prompts: str | list[int],
        params: CommonParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: CommonParams | Sequence[CommonParams] | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: CommonParams | Sequence[CommonParams] | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Complete a prompt, or every prompt of a list, all at once; outputs come in the order of the prompts.

        prompts: a text, a list of token ids, or a list of either. params: one for all, one for each, or None for the model's
        generation_config. deadline: seconds. Raises ServiceError; of a list, a request that fails while it runs has
        `error` set instead, and one that finds the queue full waits for room. Raises InvalidRequestError before
        anything is sent.
        """
        made, alone = self._submissions(prompts, params, request_id, priority, deadline)
        streams = [self._stream(one) for one in made]
        try:
            if alone:
                return streams[0].result()
            return [self._result(streams, number, made) for number in range(len(made))]
        finally:
            for stream in streams:
                stream.close()

    def stream(
        self,
        prompt: Prompt,
        params: CommonParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Stream:
        """Complete one prompt: what its outputs grow by, as it comes."""
        return self._stream(self._submission(prompt, params, request_id, priority, deadline, stream=True))

    def attach(self, request_id: str) -> Stream:
        """The stream of a request that an earlier client of this session sent, from its beginning."""
        return self._stream(self._attachment(request_id))

    def stats(self) -> StatsReply:
        """Numbers of the engine and of its service."""
        reply: StatsReply = self._ask(Stats).result()
        return reply

    def health(self) -> Pong:
        """How the engine is now. Raises ServiceError when it does not answer."""
        reply: Pong = self._ask(Ping).result()
        return reply

    def close(self, *, keep_session: bool = False) -> None:
        """End all requests and the connection. keep_session: let them run on, for another client with this `session`."""
        self._connection.close(keep_session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _stream(self, made: Submission) -> Stream:
        mailbox = Mailbox()
        stream = Stream(self, self._connection, mailbox, self._reading(made, mailbox))
        self._send(made, mailbox)
        return stream

    def _result(self, streams: list[Stream], number: int, made: list[Submission]) -> RequestOutput:
        at_once = number > 0
        while True:
            try:
                return streams[number].result()
            except ServiceError as error:
                outcome, at_once = self._outcome(error, made[number], at_once), False
            if isinstance(outcome, RequestOutput):
                return outcome
            time.sleep(outcome)
            for one in self._again(streams, number):
                made[one] = made[one].again()
                streams[one] = self._stream(made[one])

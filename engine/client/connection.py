"""The thread that owns a client's socket and its state machine."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import zmq

from pagefork.endpoint import find
from pagefork.scheduler.errors import EngineMisuseError, PageforkError
from pagefork.wire import Code

from .request import Event, Sink
from .state import ClientState

logger = logging.getLogger("pagefork")

Command = Callable[[ClientState], None]
Post = Callable[[Sequence[tuple[Sink, Event]]], None]

_BYE_MS = 200  # how long the last messages may take to leave
_BATCH = 64  # messages read before their events are delivered
_MAX_POLL_MS = 3_600_000
_GONE = zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
_DENIED = zmq.EVENT_HANDSHAKE_FAILED_AUTH
_UNLIKE = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Curve(NamedTuple):
    """Keys in Z85: the engine's public one, and the client's own pair."""

    server: bytes
    public: bytes
    secret: bytes


class Connection:
    """Keeps a client connected: pings, reads, and obeys commands, in one daemon thread.

    `post` is called in that thread with what is to be delivered; a RuntimeError of its says that nobody is left. What
    begins with an underscore and isn't set in __init__ is the thread's alone.
    """

    def __init__(self, address: str, token: str | None, curve: Curve | None, state: ClientState, post: Post) -> None:
        self._address = address
        self._token = token
        self._curve = curve
        self._state = state
        self._post = post
        self._pid = os.getpid()
        self._commands: deque[Command] = deque()
        self._lock = threading.Lock()  # the thread takes it once, at its end, so that no command comes after
        self._woken = False
        self._closed = False
        self._keep_session = False
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._context = zmq.Context()
        self._number: int | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._unsent: deque[list[bytes]] = deque()
        self._thread = threading.Thread(target=self._run, name="pagefork-client", daemon=True)
        self._thread.start()

    def command(self, command: Command) -> None:
        """Have the thread do something. Raises EngineMisuseError after close(), and in a process that was forked off."""
        self.check()
        with self._lock:
            self.check()
            self._push(command)

    def check(self) -> None:
        """Raise EngineMisuseError where this connection can't be used any more."""
        self.check_process()
        if self._closed:
            raise EngineMisuseError("the client is closed; make a new one")

    def check_process(self) -> None:
        """Raise EngineMisuseError in a process that was forked off: this thread is not in it."""
        if os.getpid() != self._pid:
            raise EngineMisuseError(f"this client belongs to process {self._pid}; make a new one after a fork")

    def later(self, command: Command) -> None:
        """As command(), for those who may come too late: destructors and readers that leave."""
        if os.getpid() == self._pid and not self._closed:
            self._push(command)

    def close(self, keep_session: bool = False) -> None:
        """End all requests and the thread. Unless the session is kept, the engine is told that it is over."""
        if os.getpid() != self._pid or self._closed:
            return
        self._keep_session, self._closed = keep_session, True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _push(self, command: Command) -> None:
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            with suppress(OSError):  # it is full, so the thread will wake; or closed, as the thread has ended
                self._writer.send(b"\0")

    def _run(self) -> None:
        reason = "the client was closed"
        try:
            while not self._closed:
                self._turn()
        except Exception as error:
            logger.exception("the client's thread failed")
            reason = f"the client failed: {type(error).__name__}: {error}"
        finally:
            self._end(reason)

    def _turn(self) -> None:
        """Obey, do what is due, send, deliver, wait, read."""
        self._obey()
        seconds = self._state.tick()
        self._follow()
        self._write()
        self._deliver()
        self._wait(0 if self._state.connection != self._number else int(min(seconds * 1000 + 1, _MAX_POLL_MS)))

    def _obey(self) -> None:
        while self._commands:
            self._commands.popleft()(self._state)

    def _deliver(self) -> None:
        if events := self._state.take_events():
            try:
                self._post(events)
            except RuntimeError:  # the loop that read is closed
                self._closed = True

    def _follow(self) -> None:
        """Have the connection that the state wants, and no other."""
        if self._state.connection == self._number:
            return
        self._disconnect()
        self._number = self._state.connection
        if self._number is None:
            return
        try:
            endpoint, token = find(self._address)
            self._connect(endpoint)
        except (PageforkError, zmq.ZMQError, OSError) as error:
            self._state.broken(str(error))
        else:
            self._state.opened(self._token or token)

    def _connect(self, endpoint: str) -> None:
        found = self._socket = self._context.socket(zmq.DEALER)
        options = {
            zmq.LINGER: 0,
            zmq.RECONNECT_IVL: -1,  # a new socket for every attempt: what was meant for one engine must not reach the next
            zmq.IPV6: "[" in endpoint,
            zmq.RCVHWM: 256,
            zmq.SNDHWM: 256,
            zmq.HANDSHAKE_IVL: 5000,
            zmq.HEARTBEAT_IVL: 2000,
            zmq.HEARTBEAT_TIMEOUT: 6000,
            zmq.HEARTBEAT_TTL: 6000,
        }
        for option, value in options.items():
            found.setsockopt(option, value)
        if self._curve is not None:
            found.curve_serverkey, found.curve_publickey, found.curve_secretkey = self._curve
        self._monitor = found.get_monitor_socket(_GONE | _DENIED | _UNLIKE)
        found.connect(endpoint)

    def _disconnect(self, linger_ms: int = 0) -> None:
        self._unsent.clear()
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=linger_ms)
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._socket = self._monitor = None

    def _write(self) -> None:
        self._unsent += self._state.take_messages()
        while self._unsent and self._socket is not None:
            try:
                self._socket.send_multipart(self._unsent[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._unsent.popleft()

    def _wait(self, milliseconds: int) -> None:
        poller = zmq.Poller()
        poller.register(self._reader, zmq.POLLIN)
        if self._socket is not None:
            poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if self._unsent else 0))
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(milliseconds))
        if self._reader.fileno() in ready:
            self._drain()
        said = self._heard() if self._monitor in ready else None
        if self._socket in ready or said is not None:
            while not self._read() and said is not None:
                self._deliver()
            if said is not None:
                self._state.broken(*said)

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while self._reader.recv(64):
                pass
        self._woken = False

    def _read(self) -> bool:
        """Hand on what has come; whether that was all."""
        assert self._socket is not None
        for _ in range(_BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._state.receive(frames)
        return False

    def _heard(self) -> tuple[str, Code | None] | None:
        """What the socket's monitor has to say."""
        assert self._monitor is not None
        event, value = struct.unpack("=hi", self._monitor.recv_multipart()[0])
        if event & _DENIED:
            return f"the engine does not know this client's key (status {value})", Code.UNAUTHENTICATED
        if event & _UNLIKE:
            return f"what listens at {self._address} is no engine, or its key is another one (code {value:#x})", None
        return f"nothing listens at {self._address}, or it closed the connection", None

    def _end(self, reason: str) -> None:
        with self._lock:
            self._closed = True
        self._obey()
        self._state.close(reason, keep_session=self._keep_session)
        self._deliver()
        self._write()
        self._disconnect(_BYE_MS)
        self._reader.close()
        self._writer.close()
        self._context.term()

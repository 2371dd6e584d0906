"""Messages to and from the ROUTER socket, none of which waits."""

from __future__ import annotations

import zmq

from pagefork import wire
from pagefork.wire import MAX_FRAMES, Code

from .auth import NotAuthenticated, Principal
from .logs import warn
from .seam import Sent

_GIVEN = b"\0"  # what the routing ids begin with that ZeroMQ gives
_NAMED = wire.encode(
    wire.Error(
        code=Code.UNAUTHENTICATED,
        message="this connection has set ROUTING_ID: leave that to ZeroMQ, or who takes the same one speaks for its session",
    )
)
_KEPT_BYTES = 16 << 20  # of one message: its frames are bounded one by one, but not their number


class Router:
    """A bound ROUTER socket and who its messages are from."""

    def __init__(self, socket: zmq.Socket[bytes], principal: Principal) -> None:
        self._socket = socket
        self._principal = principal

    def send(self, peer: bytes, frames: list[bytes]) -> Sent:
        """Send a message to a peer by its routing id, whole or not at all."""
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                warn("socket.send_failed", error=error)
            return Sent.GONE
        return Sent.OK

    def receive(self) -> tuple[bytes, list[bytes], str | None] | None:
        """A peer's routing id, the frames of a message and its principal; None when nothing is there.

        Of a message that is too long come so many frames that it is refused, and not what would fill the memory. Peers that
        have named themselves are refused: when a connection is gone its name is anybody's, its session is not.
        """
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            peer, frames, size = frame.bytes, list[bytes](), 0
            while frame.more:  # the rest of a message is there once its first frame is
                frame = self._socket.recv(copy=False)
                size += len(frame)
                if len(frames) <= MAX_FRAMES:
                    frames.append(frame.bytes if size <= _KEPT_BYTES else b"")
            try:
                principal = self._principal(frame)
            except NotAuthenticated:
                warn("message.not_authenticated")
                continue
            if peer.startswith(_GIVEN):
                return peer, frames, principal
            self.send(peer, _NAMED)

"""Who may connect over CURVE, and who a message is from."""

from __future__ import annotations

from collections.abc import Callable

import zmq
from zmq.auth.thread import ThreadAuthenticator

from .keys import KeyPair

ZAP_DOMAIN = "pagefork"

Principal = Callable[[zmq.Frame], str | None]


class NotAuthenticated(Exception):
    """A message from a connection that nobody has vouched for."""


class Doorkeeper:
    """Lets in clients by their public keys. libzmq asks it, in a thread of its own, about every connection."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair, clients: frozenset[bytes]) -> None:
        self._keys = keys
        self._clients = clients
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN, self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client's key is known."""
        return domain == ZAP_DOMAIN and key in self._clients

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Before the socket is bound."""
        socket.curve_server = True
        socket.curve_secretkey = self._keys.secret
        socket.curve_publickey = self._keys.public
        socket.zap_domain = ZAP_DOMAIN.encode()
        # Without this a handler that is gone would mean that everybody may come in.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def principal(self, frame: zmq.Frame) -> str:
        """Who sent a frame. Raises NotAuthenticated."""
        try:
            key = str(frame.get("User-Id"))
        except (zmq.ZMQError, UnicodeDecodeError):
            raise NotAuthenticated from None
        if key.encode() not in self._clients:
            raise NotAuthenticated
        return f"curve:{key}"

    def close(self) -> None:
        """End the thread, once the sockets that ask it are closed."""
        self._authenticator.stop()

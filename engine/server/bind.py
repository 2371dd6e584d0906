"""The socket that clients connect to: its name, its address, and what guards it."""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import zmq

from pagefork.endpoint import Files
from pagefork.scheduler.errors import ConfigError
from pagefork.wire import MAX_FRAME

from .auth import Doorkeeper, Principal
from .config import ServiceConfig
from .keys import KeyPair, read_client_keys, read_key_pair, read_secret, write_new

_SHORTEST_TOKEN, _LONGEST_TOKEN = 16, 256  # characters


class Plan(NamedTuple):
    """What a configuration asks for, checked and read before anything is made. host None: a socket in the runtime directory."""

    host: str | None = None
    port: str = ""
    keys: KeyPair | None = None
    clients: frozenset[bytes] = frozenset()
    token: str | None = None


class Bound:
    """A ROUTER that is bound, and the name that it holds in the runtime directory until close()."""

    def __init__(self, config: ServiceConfig) -> None:
        """To be made before other threads make files: for the time of a bind the umask is another one.

        Raises ConfigError for settings that don't go together, an address or a name that is taken, and bad files.
        """
        self.files = Files.of(config.name)
        plan = _plan(config)
        self._lock = _claim(config.name, self.files)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        set_options(self.socket)
        self._doorkeeper = None if plan.keys is None else Doorkeeper(self._context, plan.keys, plan.clients)
        self.token = plan.token
        self.token_file: Path | None = None if config.token_file is None else Path(config.token_file).absolute()
        self.principal: Principal = lambda frame: None
        try:
            self.endpoint = self._bind(plan)
        except BaseException:
            self.close()
            raise

    def _bind(self, plan: Plan) -> str:
        if self._doorkeeper is not None:
            self._doorkeeper.guard(self.socket)
            self.principal = self._doorkeeper.principal
        for file in (self.files.endpoint, self.files.token):
            file.unlink(missing_ok=True)  # of an engine that was killed
        if plan.host is None:
            self.principal = lambda frame: "owner"
            self._listen(f"ipc://{self.files.socket}")
            return f"ipc://{self.files.socket}"
        self.socket.ipv6 = ":" in plan.host
        self._listen(f"tcp://{plan.host}:{plan.port}")
        endpoint = bytes(self.socket.last_endpoint).decode().rstrip("\0")  # type: ignore[arg-type]  # of this option it is bytes
        if plan.keys is None and self.token is None:
            self.token, self.token_file = secrets.token_urlsafe(32), self.files.token
            write_new(self.files.token, self.token + "\n", 0o600)
        write_new(self.files.endpoint, endpoint + "\n", 0o600)
        return endpoint

    def _listen(self, endpoint: str) -> None:
        before = os.umask(0o177)
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"can't listen on {endpoint}: {error.strerror.lower()}") from None
        finally:
            os.umask(before)

    def close(self) -> None:
        """Send what is under way for at most a second, and leave no file but the lock's, which others may wait for."""
        self.socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()
        for file in (self.files.endpoint, self.files.token, self.files.socket):
            with suppress(OSError):
                file.unlink(missing_ok=True)
        os.close(self._lock)


def set_options(socket: zmq.Socket[bytes]) -> None:
    """What docs/protocol.md says of the engine's socket; times in milliseconds."""
    socket.router_mandatory = True
    socket.router_handover = False
    socket.sndhwm = 256
    socket.rcvhwm = 64
    socket.maxmsgsize = MAX_FRAME
    socket.handshake_ivl = 5000
    socket.heartbeat_ivl = 2000
    socket.heartbeat_timeout = 6000
    socket.heartbeat_ttl = 6000
    socket.linger = 1000


def _plan(config: ServiceConfig) -> Plan:
    given = {name: getattr(config, name) for name in ("token_file", "curve_secret_key", "curve_clients")}
    if config.bind is None:
        if named := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(named)} is for TCP: give bind=tcp://HOST:PORT, or leave it out")
        return Plan()
    host, port = _split(config.bind)
    secret_key, clients = given["curve_secret_key"], given["curve_clients"]
    if (secret_key is None) != (clients is None):
        raise ConfigError("curve_secret_key and curve_clients go together: the engine's keys, and those of its clients")
    if secret_key is None or clients is None:
        if not _is_loopback(host):
            raise ConfigError(
                f"bind={config.bind!r} can be reached from other machines, so it takes CURVE keys: curve_secret_key and "
                "curve_clients, which `pagefork keys new` makes; or bind tcp://127.0.0.1:PORT"
            )
        return Plan(host, port, token=None if config.token_file is None else _token(Path(config.token_file)))
    if config.token_file is not None:
        raise ConfigError("token_file is for TCP without CURVE keys, which tell who a client is")
    return Plan(host, port, read_key_pair(Path(secret_key)), read_client_keys(Path(clients)))


def _split(bind: str) -> tuple[str, str]:
    """Host and port; `localhost` is where names are not looked up."""
    scheme, _, rest = bind.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not (port == "*" or (port.isdecimal() and port.isascii() and int(port) < 1 << 16)):
        raise ConfigError(f"bind={bind!r}: an address reads tcp://HOST:PORT, with a port below 65536, or 0 for any that is free")
    return ("127.0.0.1" if host == "localhost" else host), port


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:  # a network interface, or *
        return False


def _token(file: Path) -> str:
    token = read_secret(file)
    if not _SHORTEST_TOKEN <= len(token) <= _LONGEST_TOKEN or not token.isprintable():
        raise ConfigError(
            f"{file}: a token has {_SHORTEST_TOKEN} to {_LONGEST_TOKEN} printable characters, this one has {len(token)}"
        )
    return token


def _claim(name: str, files: Files) -> int:
    """The lock of a name, which the system lets go when this process ends, however it does."""
    try:
        number = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"{files.lock} can't be opened: {error.strerror}") from None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(number, 20).decode("ascii", "replace").strip()
        os.close(number)
        raise ConfigError(
            f"an engine named {name!r} runs already (process {holder}): stop it, or give this one another name"
        ) from None
    os.ftruncate(number, 0)
    os.write(number, b"%d\n" % os.getpid())
    return number

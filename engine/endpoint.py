"""Where engines are found: the runtime directory, and the endpoint and token that a name stands for."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

from pagefork.scheduler.errors import ConfigError

DIRECTORY_VARIABLE = "PAGEFORK_RUNTIME_DIR"
TOKEN_VARIABLE = "PAGEFORK_TOKEN"
MAX_SOCKET_PATH = 107  # bytes; the address of a Unix socket ends with a zero byte within 108

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_MODE = 0o700


class Address(NamedTuple):
    """Where a client connects, and the token that it shows there, where one is known."""

    endpoint: str
    token: str | None = None


def find(address: str) -> Address:
    """The address of an engine by its name, or by its endpoint (ipc://..., tcp://...).

    The token is that of the environment's PAGEFORK_TOKEN, else the one that the engine of this name left for the clients
    of its own user. Raises ConfigError for what is no name, and as runtime_directory does.
    """
    given = os.environ.get(TOKEN_VARIABLE) or None
    if "://" in address:
        if not address.startswith(("ipc://", "tcp://")):
            raise ConfigError(f"address={address!r}: an endpoint begins with ipc:// or tcp://")
        return Address(address, given)
    files = Files.of(address)
    endpoint = _read(files.endpoint)
    return Address(endpoint, given or _read(files.token)) if endpoint else Address(f"ipc://{files.socket}", given)


class Files(NamedTuple):
    """What an engine has in the runtime directory.

    lock: held while it runs; its text is the process. endpoint and token: of one that is bound to a TCP port.
    """

    lock: Path
    socket: Path
    endpoint: Path
    token: Path

    @classmethod
    def of(cls, name: str) -> Files:
        """Those of a name. Raises ConfigError for what is no name, and as runtime_directory does."""
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"name={name!r}: an engine's name is 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', and begins with no '.'"
            )
        directory = runtime_directory()
        files = cls(*(directory / f"{name}.{suffix}" for suffix in ("lock", "ipc", "endpoint", "token")))
        if len(os.fsencode(files.socket)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"{files.socket} is too long for a socket, whose path has at most {MAX_SOCKET_PATH} bytes: "
                f"set {DIRECTORY_VARIABLE} to a shorter one"
            )
        return files


def runtime_directory() -> Path:
    """The directory that is this user's alone: $PAGEFORK_RUNTIME_DIR, $XDG_RUNTIME_DIR/pagefork, or one for temporary files.

    Made when it is missing. Raises ConfigError when another user owns it or its mode lets others in: they could answer in
    the engine's place.
    """
    path = Path(os.path.abspath(_directory()))  # noqa: PTH100 - resolve() would follow the link that is refused below
    try:
        path.mkdir(_MODE)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(
            f"the runtime directory {path} can't be made: {error.strerror}; {DIRECTORY_VARIABLE} names another"
        ) from None
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        fault = "is no directory (a link is not followed)"
    elif found.st_uid != os.geteuid():
        fault = f"belongs to user {found.st_uid}, not to user {os.geteuid()} who runs this"
    elif (mode := stat.S_IMODE(found.st_mode) & 0o777) != _MODE:
        fault = f"has mode {mode:04o} instead of {_MODE:04o}"
    else:
        return path
    raise ConfigError(f"the runtime directory {path} {fault}; mend it, or set {DIRECTORY_VARIABLE}")


def _directory() -> str:
    if named := os.environ.get(DIRECTORY_VARIABLE):
        return named
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session and Path(session).is_dir():
        return f"{session}/pagefork"
    return f"{tempfile.gettempdir()}/pagefork-{os.geteuid()}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None

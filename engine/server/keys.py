"""CURVE keys in files, in the format of ZeroMQ's certificates, and secrets that only their owner may read."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from pagefork.scheduler.errors import ConfigError

PUBLIC_SUFFIX, SECRET_SUFFIX = ".key", ".key_secret"

_LINE = re.compile(rb"""^\s*(public-key|secret-key)\s*=\s*["']([^"']*)["']\s*$""", re.MULTILINE)
_LARGEST = 1 << 16  # bytes of a file with a key or a token


class KeyPair(NamedTuple):
    """The two keys of one side, in Z85: 40 characters each."""

    public: bytes
    secret: bytes


def new_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a key pair: the file with the public key, and that with both, which only its owner may read.

    Raises FileExistsError rather than overwrite a file.
    """
    import zmq  # here, so that commands without a service do without it

    public, secret = zmq.curve_keypair()
    files = folder / f"{name}{PUBLIC_SUFFIX}", folder / f"{name}{SECRET_SUFFIX}"
    for file in files:
        if os.path.lexists(file):
            raise FileExistsError(17, "there is such a file already, which is not overwritten", str(file))
    folder.mkdir(parents=True, exist_ok=True)
    shown = f'metadata\ncurve\n    public-key = "{public.decode()}"\n'
    write_new(files[1], f'{shown}    secret-key = "{secret.decode()}"\n', 0o600)
    write_new(files[0], shown, 0o644)
    return files


def write_new(file: Path, text: str, mode: int) -> None:
    """Write a file that is not there yet, whoever may have prepared a link in its place. Raises FileExistsError."""
    number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(number, "w", encoding="ascii") as opened:
        opened.write(text)


def read_key_pair(file: Path) -> KeyPair:
    """The keys of a secret key file. Raises ConfigError."""
    found = _keys(read_secret(file).encode(), file)
    if found.keys() != {"public-key", "secret-key"}:
        raise ConfigError(f"{file} lacks the secret key: give the file of `pagefork keys new` that ends in {SECRET_SUFFIX}")
    return KeyPair(found["public-key"], found["secret-key"])


def read_public_key(file: Path) -> bytes:
    """The public key of a file that holds one. Raises ConfigError."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}") from None
    found = _keys(data, file)
    if "public-key" not in found:
        raise ConfigError(f"{file} holds no public key: give a file of `pagefork keys new` that ends in {PUBLIC_SUFFIX}")
    return found["public-key"]


def read_client_keys(path: Path) -> frozenset[bytes]:
    """The public keys of a file, or of all that end in .key in a folder. Raises ConfigError; for none, too."""
    files = sorted(path.glob(f"*{PUBLIC_SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} has no file that ends in {PUBLIC_SUFFIX}, so no client could connect")
    return frozenset(map(read_public_key, files))


def read_secret(file: Path) -> str:
    """The text of a file that only its owner can read, without white space around it. Raises ConfigError."""
    try:
        with file.open("rb") as opened:
            facts = os.fstat(opened.fileno())
            data = opened.read(_LARGEST)
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}") from None
    if facts.st_uid not in (os.geteuid(), 0) or stat.S_IMODE(facts.st_mode) & 0o077:
        raise ConfigError(
            f"{file} holds a secret, but has mode {stat.S_IMODE(facts.st_mode):04o} and belongs to user {facts.st_uid}: "
            "make it yours, with mode 0600"
        )
    text = data.decode("ascii", "replace").strip()
    if not text or not text.isascii():
        raise ConfigError(f"{file} should hold a secret, in ASCII; it is {'no ASCII text' if text else 'empty'}")
    return text


def _keys(data: bytes, file: Path) -> dict[str, bytes]:
    from zmq.utils import z85

    found = {name.decode(): key for name, key in _LINE.findall(data[:_LARGEST])}
    for name, key in found.items():
        try:
            whole = len(z85.decode(key)) == 32
        except (ValueError, KeyError, TypeError, IndexError):
            whole = False
        if len(key) != 40 or not whole:
            raise ConfigError(f"{file}: its {name} is no CURVE key of 40 characters")
    return found

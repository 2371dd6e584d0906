"""A process that its parent configures by standard input and outlives in no case: the parent's side."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec

from pagefork.scheduler.errors import ConfigError, ModelError, PageforkError

from .config import ServiceConfig

_LONGEST = 1 << 16  # bytes of what a child says when it is ready
_PATIENCE = 10.0  # seconds beyond what a child was given to end in
_REASONS: dict[str, type[PageforkError]] = {"ConfigError": ConfigError, "ModelError": ModelError}


class LaunchError(PageforkError):
    """A child ended before it was ready."""


class Child:
    """A process of a group of its own, as child.Parent describes it. It ends when this object's process does."""

    def __init__(
        self,
        name: str,
        module: str,
        config: msgspec.Struct,
        stderr: int | IO[bytes] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`python -m MODULE`, with its configuration. name: in errors. stderr, environment: as of subprocess.Popen."""
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C on a terminal is the parent's, who tells its children in their order
        )
        self._said = bytearray()
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        with suppress(BrokenPipeError):  # why it ended is what ready() tells
            self._stdin.write(msgspec.json.encode(config) + b"\n")
            self._stdin.flush()

    def fileno(self) -> int:
        """Readable when the child has said something, or has ended."""
        return self._stdout.fileno()

    def ready(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for what it says when it is ready. Raises as hear(), and TimeoutError after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self], [], [], left)[0]:
                raise TimeoutError(f"{self.name} was not ready after {timeout:g} seconds")
            if (facts := self.hear()) is not None:
                return facts

    def hear(self) -> dict[str, Any] | None:
        """What it says when it is ready, once that is whole; to be called when fileno() is readable.

        Raises the PageforkError that it ended with, or LaunchError when it ended without a word.
        """
        piece = os.read(self.fileno(), _LONGEST)
        self._said += piece
        if not piece or len(self._said) > _LONGEST:
            raise LaunchError(f"{self.name} ended before it was ready: {self.ending()}")
        if not self._said.endswith(b"\n"):
            return None
        facts: dict[str, Any] = json.loads(self._said)
        if "error" in facts:
            self.wait(_PATIENCE)
            raise _REASONS.get(facts.get("kind", ""), PageforkError)(facts["error"])
        return facts

    def ending(self) -> str:
        """Wait for the end of a child that is about to, and tell how it was."""
        code = self.wait(_PATIENCE)
        if code >= 0:
            return f"exit code {code}"
        return f"killed by {signal.Signals(-code).name}"

    def wait(self, seconds: float) -> int:
        """Its exit code; after so many seconds it is killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        self.process.send_signal(number)

    def close(self) -> None:
        """Let go of its pipes; one that runs takes it for the end of its parent."""
        for pipe in (self._stdin, self._stdout):
            with suppress(BrokenPipeError):
                pipe.close()


class Served:
    """An engine that serves in a process of its own, from the beginning of a `with` block to its end.

        with Served(ServiceConfig(engine=EngineConfig(model="demo"))) as served:
            connect(served.endpoint)

    Raises, when the block begins, what the engine could not start for: ConfigError, ModelError; LaunchError; TimeoutError.
    """

    endpoint: str
    boot_id: str
    facts: dict[str, Any]

    def __init__(
        self,
        config: ServiceConfig,
        *,
        stderr: int | IO[bytes] | None = None,
        timeout: float | None = 120.0,
        environment: dict[str, str] | None = None,
    ) -> None:
        """timeout: seconds until it is ready."""
        self.config = config
        self._stderr = stderr
        self._timeout = timeout
        self._environment = environment
        self._child: Child

    def __enter__(self) -> Self:
        self._child = Child("the engine", "pagefork.server", self.config, self._stderr, self._environment)
        try:
            self.facts = self._child.ready(self._timeout)
        except BaseException:
            self.kill()
            self._child.close()
            raise
        self.endpoint, self.boot_id = self.facts["endpoint"], self.facts["boot_id"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._child.close()

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._child.process.pid

    @property
    def token(self) -> str | None:
        """What a client on TCP shows; None where no token is asked for."""
        file = self.facts["token_file"]
        return None if file is None else Path(file).read_text(encoding="ascii").strip()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -9 when it was killed by signal 9."""
        return self._child.process.poll()

    def terminate(self) -> None:
        """Ask it to end once its requests have, or its drain_timeout is over."""
        self._child.signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now, as `kill -9` does."""
        self._child.signal(signal.SIGKILL)
        self._child.process.wait()

    def stop(self) -> int:
        """terminate(), and wait for the end. Its exit code."""
        self.terminate()
        return self._child.wait(self.config.drain_timeout + _PATIENCE)

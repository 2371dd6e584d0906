"""The process that a user starts: it runs an engine, and perhaps a gateway before it, until it is told to stop."""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable
from typing import Any

import msgspec

from pagefork.scheduler.errors import PageforkError

from .config import ServiceConfig
from .launch import Child
from .wakeup import Wakeup

Facts = dict[str, Any]
MakesGateway = Callable[[Facts], msgspec.Struct]  # its configuration, from what the engine says when it is ready

_PATIENCE = 10.0  # seconds beyond what a child was given to end in
_ORPHAN_SECONDS = 5.0  # what a gateway gets to end in when its engine is gone


class Supervisor:
    """Starts the engine, then the gateway; ends the gateway, then the engine.

    SIGTERM and SIGINT let both end what they have accepted; at a second one they are killed. A child that dies is not
    started again: the other one is ended, and run() raises. To be made in the main thread, whose signals it takes.
    """

    def __init__(self, config: ServiceConfig, gateway: MakesGateway | None, say: Callable[[Facts, Facts | None], object]) -> None:
        """`say` is called once all is ready, with what the engine and the gateway say of themselves."""
        self._config = config
        self._gateway = gateway
        self._say = say
        self._wakeup = Wakeup()
        self._children: list[Child] = []  # in the order of their start

    def run(self) -> None:
        """Until a signal. Raises the error that a child could not start for, or PageforkError when one dies."""
        try:
            engine = self._start("the engine", "pagefork.server", self._config)
            if engine is None:
                return
            gateway = None
            if self._gateway is not None:
                gateway = self._start("the gateway", "pagefork.http", self._gateway(engine))
                if gateway is None:
                    return
            self._say(engine, gateway)
            while not self._wakeup.stops:
                self._sleep()
        finally:
            self._stop()

    def _start(self, name: str, module: str, config: msgspec.Struct) -> Facts | None:
        """What a child says when it is ready; None when a signal comes first."""
        child = Child(name, module, config)
        self._children.append(child)
        while not self._wakeup.stops:
            if self._sleep(child) and (facts := child.hear()) is not None:
                return facts
        return None

    def _sleep(self, child: Child | None = None) -> bool:
        """Until something happens; whether `child` says something. Raises PageforkError when one has died in silence."""
        watched: list[Wakeup | Child] = [self._wakeup] if child is None else [self._wakeup, child]
        select.select(watched, [], [])
        self._wakeup.clear()
        dead = [other for other in self._children if other.process.poll() is not None]
        says = child is not None and bool(select.select([child], [], [], 0)[0])  # after poll(): its last words count
        for other in dead:
            if other is not child or not says:
                raise PageforkError(f"{other.name} has died: {other.ending()}")
        return says

    def _stop(self) -> None:
        """End all, the last one first. Where one has died, what is left gets no time for work that it can't do."""
        lost = any(child.process.poll() is not None for child in self._children)
        for child in reversed(self._children):
            child.signal(signal.SIGTERM)
            self._await(child, _ORPHAN_SECONDS if lost else self._config.drain_timeout + _PATIENCE)
            child.close()

    def _await(self, child: Child, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while child.process.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0 or self._wakeup.stops > 1:
                child.signal(signal.SIGKILL)
                child.process.wait()
                return
            select.select([self._wakeup], [], [], left)
            self._wakeup.clear()

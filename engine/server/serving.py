"""The loop of a served engine, over its socket, its signals and what its engine says."""

from __future__ import annotations

import gc
import logging
import math
import os
import select
import time
from collections.abc import Mapping

import msgspec
import zmq

from pagefork.scheduler.endings import described
from pagefork.scheduler.errors import ConfigError
from pagefork.value_functions import VALUE_FUNCTIONS, MakesValueFunction

from .bind import Bound
from .child import Parent
from .config import ServiceConfig
from .gate import EngineGate, Loaded
from .logs import log, warn
from .router import Router
from .seam import Facts, Timing
from .service import Service
from .wakeup import Wakeup

logger = logging.getLogger("pagefork")

_FAILED = 1  # exit code
_BATCH = 64  # messages between two looks at what the engine has to say
_BATCH_SECONDS = 0.01  # or fewer, where they take long
_STEP_SECONDS = 5.0  # how long the end waits for the step under way


class Serving:
    """An engine behind a bound socket."""

    def __init__(
        self,
        config: ServiceConfig,
        functions: Mapping[str, MakesValueFunction],
        bound: Bound,
        wakeup: Wakeup,
    ) -> None:
        """Raises ConfigError for a timing that there isn't."""
        try:
            self._timing = msgspec.convert(config.timing, Timing)
        except msgspec.ValidationError as error:
            raise ConfigError(f"timing={config.timing}: {error}") from None
        self._config = config
        self._functions = functions
        self._bound = bound
        self._wakeup = wakeup
        self._gate = EngineGate(config.engine, wakeup.wake, functions, log_prompts=config.log_prompts)
        self._router = Router(bound.socket, bound.principal)

    def run(self, parent: Parent) -> int:
        """Load, tell the parent, and serve until the end; the exit code. Raises what loading failed with."""
        loaded = self._load()
        if loaded is None:
            return 0
        service = self._service(loaded)
        facts = {
            "endpoint": self._bound.endpoint,
            "boot_id": service.boot_id,
            "token_file": None if self._bound.token_file is None else str(self._bound.token_file),
            "model_directory": loaded.facts["path"],
            "max_model_len": loaded.facts["max_model_len"],
        }
        log("engine.ready", pid=os.getpid(), **facts)
        parent.tell(**facts)
        try:
            return self._serve(service)
        except BaseException as error:  # whatever it is, clients have to know
            logger.critical("engine.failed", exc_info=error, extra={"fields": {}})
            service.close(f"the engine failed: {described(error)}")
            return _FAILED

    def _load(self) -> Loaded | None:
        """None when this process was told to stop before the engine was loaded."""
        self._gate.start()
        while not self._gate.loaded.done():
            select.select([self._wakeup], [], [])
            self._wakeup.clear()
            if self._gate.ended.done() and (failure := self._gate.ended.result()) is not None:
                raise failure
            if self._wakeup.stops or self._wakeup.orphaned:
                return None
        gc.freeze()  # what was loaded stays, and looking through it again and again would hold up the steps
        return self._gate.loaded.result()

    def _service(self, loaded: Loaded) -> Service:
        facts = Facts(
            model=self._config.engine.model,
            vocab_size=loaded.facts["vocab_size"],
            max_model_len=loaded.facts["max_model_len"],
            value_functions=list({**VALUE_FUNCTIONS, **self._functions}),
        )
        return Service(self._gate, self._router.send, facts, self._config.limits, self._timing, token=self._bound.token, log=log)

    def _serve(self, service: Service) -> int:
        """Until the service is drained or the parent dies; the exit code. Raises what the engine's thread failed with."""
        poller = zmq.Poller()
        poller.register(self._bound.socket, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        stopping = False
        while True:
            seconds = service.tick()
            if service.drained:
                break
            poller.poll(math.ceil(seconds * 1000))
            self._wakeup.clear()
            ended = self._gate.ended.done()  # before take(): what the thread said last must not be missed
            if self._wakeup.stops and not stopping:
                stopping = True
                log("engine.stopping", drain_timeout=self._config.drain_timeout)
                service.drain(self._config.drain_timeout)
            until = time.monotonic() + _BATCH_SECONDS
            for _ in range(_BATCH):
                message = self._router.receive()
                if message is None:
                    break
                service.receive(*message)
                if time.monotonic() >= until:
                    break
            service.deliver(self._gate.take())
            if ended:
                raise self._gate.ended.result() or RuntimeError("its thread ended")
            if self._wakeup.orphaned:
                warn("engine.orphaned")
                service.close("the process that started the engine is gone")
                return _FAILED
        log("engine.stopped")
        self._gate.stop(_STEP_SECONDS)
        return 0

"""The process of a served engine: what it owes its parent, from the first line of its input to its exit code."""

from __future__ import annotations

import logging
import os
import resource
from contextlib import suppress
from typing import NoReturn

from pagefork.scheduler.endings import described
from pagefork.scheduler.errors import ConfigError, PageforkError

from .bind import Bound
from .child import Parent, hold_standard_streams
from .config import ServiceConfig
from .functions import load_value_functions
from .logs import Lines
from .wakeup import Wakeup

logger = logging.getLogger("pagefork")

REFUSED, FAILED = 2, 1  # exit codes

_MOST_FILES = 1 << 16


def main() -> NoReturn:
    """Serve until a signal, the parent's death, or a failure. What can't be served is told to the parent."""
    hold_standard_streams()
    wakeup, parent = Wakeup(), Parent()
    try:
        config = parent.read(ServiceConfig)
    except EOFError:
        os._exit(FAILED)
    except ConfigError as error:
        parent.tell(error=str(error), kind="ConfigError")
        os._exit(REFUSED)
    lines = Lines(config.log_level)
    code = FAILED
    try:
        code = _serve(config, parent, wakeup)
    except PageforkError as error:
        parent.tell(error=str(error), kind=type(error).__name__)
        code = REFUSED
    except BaseException as error:
        logger.critical("engine.failed", exc_info=error, extra={"fields": {}})
        parent.tell(error=described(error), kind="PageforkError")
    finally:
        lines.close()
        # Threads that can't be ended, such as that of a value function which hangs, would hold up an orderly exit for ever.
        os._exit(code)


def _serve(config: ServiceConfig, parent: Parent, wakeup: Wakeup) -> int:
    parent.watch(wakeup.orphan)
    _allow_files()
    functions = load_value_functions(config.value_fn)
    bound = Bound(config)
    try:
        from .serving import Serving  # torch: seconds, which what can't be served should not take

        return Serving(config, functions, bound, wakeup).run(parent)
    finally:
        bound.close()


def _allow_files() -> None:
    """As many connections as the system lets this process have: without any left, ZeroMQ takes a core to try to accept one."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if most == resource.RLIM_INFINITY else min(most, _MOST_FILES)
    with suppress(OSError, ValueError):
        if least != resource.RLIM_INFINITY and least < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))

"""Value functions that a service is started with, by `NAME=MODULE:FUNCTION`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from pagefork.scheduler.endings import described
from pagefork.scheduler.errors import ConfigError
from pagefork.value_functions import MakesValueFunction

_GIVEN = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})=(?P<module>\w+(?:\.\w+)*):(?P<function>\w+)")


def load_value_functions(given: Sequence[str]) -> dict[str, MakesValueFunction]:
    """By their names. Modules are also looked for in the current directory. Raises ConfigError for what is not there."""
    found: dict[str, MakesValueFunction] = {}
    here = os.getcwd()  # noqa: PTH109 - sys.path holds texts
    sys.path.append(here)
    try:
        for entry in given:
            parts = _GIVEN.fullmatch(entry)
            if parts is None:
                raise ConfigError(
                    f"value_fn={entry!r}: it reads NAME=MODULE:FUNCTION, with a name of A-Z, a-z, 0-9, '.', '_' and '-'"
                )
            if parts["name"] in found:
                raise ConfigError(f"value_fn={entry!r}: the name {parts['name']!r} is given twice")
            found[parts["name"]] = _load(entry, parts["module"], parts["function"])
    finally:
        sys.path.remove(here)
    return found


def _load(entry: str, module: str, function: str) -> MakesValueFunction:
    try:
        made = getattr(import_module(module), function, None)
    except BaseException as error:  # noqa: BLE001 - a module may do anything when it is imported, and leave as well
        raise ConfigError(f"value_fn={entry!r}: {module} can't be imported: {described(error)}") from None
    if not callable(made):
        raise ConfigError(f"value_fn={entry!r}: {module} has no function {function!r}")
    return made  # type: ignore[no-any-return]

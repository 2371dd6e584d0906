"""Settings from a TOML file and from the environment, named as the flags are: the layers below the command line."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_origin

import msgspec
import typer

from pagefork.cli.errors import warn
from pagefork.cli.fields import Field
from pagefork.scheduler.errors import ConfigError

PREFIX = "PAGEFORK_"
_NO_FLAGS = {"PAGEFORK_CONFIG", "PAGEFORK_RUNTIME_DIR", "PAGEFORK_TOKEN", "PAGEFORK_API_KEY", "PAGEFORK_NATIVE"}

Settings = dict[str, Any]
Fields = Mapping[str, tuple[Field, ...]]  # by flag; one that several Structs share has a field of each
Place = tuple[str, ...]  # a command by its words, ("bench", "latency"), or a group of commands; () is all of them


def read_settings(ctx: typer.Context, file: Path | None, fields: Fields) -> list[Settings]:
    """What the sections of the file, from the top to the command's own, then what the environment gives the flags of
    the running command, in the types of its `fields`.

    Without a file PAGEFORK_CONFIG names it. Raises ConfigError for a name that no command knows, in the file, and for
    a value that its flag can't take; OSError for a file that can't be read.
    """
    root: Any = ctx.find_root().command
    flags = _flags_by_command(root)
    named = os.environ.get(PREFIX + "CONFIG")
    path = file or (Path(named) if named else None)
    return [
        *(_from_file(path, _place(ctx), flags, fields) if path else []),
        _from_environment(set().union(*flags.values()), fields),
    ]


def _from_file(path: Path, command: Place, flags: dict[Place, set[str]], fields: Fields) -> list[Settings]:
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path} is not TOML: {error}") from None
    found: list[Settings] = []
    for place, section in sorted(_sections(document, set(flags)).items()):
        where = f"{path}: [{'.'.join(place)}]" if place else str(path)
        allowed = set().union(*(names for name, names in flags.items() if name[: len(place)] == place))
        settings: Settings = {}
        mine: Settings = {}
        for given, value in section.items():
            key = given.replace("-", "_")
            if key not in allowed:
                raise ConfigError(f"{where} has {given!r}, which is no flag{_meant(key, allowed, _flag_name)}")
            if key in settings:
                raise ConfigError(f"{where} has {given!r} twice, with a dash and with an underscore")
            settings[key] = value
            if key in fields and command[: len(place)] == place:
                mine[key] = _typed(f"{where}: {given} = {value!r}", value, fields[key])
        found.append(mine)
    return found


def _from_environment(names: set[str], fields: Fields) -> Settings:
    """Unknown names are warned of, not refused: other software names variables after what it runs."""
    found = {}
    for variable, text in sorted(os.environ.items()):
        key = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or variable in _NO_FLAGS or not text:
            continue
        if key not in names:
            warn(f"{variable} in the environment is no flag{_meant(key, names, _variable)}")
        elif key in fields:
            found[key] = _typed(f"{variable}={text!r}", text, fields[key], text=True)
    return found


def _typed(where: str, value: Any, fields: tuple[Field, ...], *, text: bool = False) -> Any:
    """`value` in the type of the first field that takes it; `text`: as the environment has it, lists and tables in JSON."""
    field, *others = fields
    if value == "none" and field.optional and field.kind is not str:
        return None
    listed = get_origin(field.kind) in (list, dict)
    try:
        return msgspec.convert(
            msgspec.json.decode(value) if text and listed else value,
            field.hint,
            strict=listed or not text,
            str_keys=True,
            dec_hook=lambda kind, item: kind(item),
        )
    except msgspec.MsgspecError as error:
        with suppress(ConfigError):
            if others:
                return _typed(where, value, tuple(others), text=text)
        allowed = ", ".join(part for part in (field.type_name, "in JSON" if text and listed else "", field.bounds) if part)
        raise ConfigError(f"{where} is refused: it takes {allowed}{f' ({error})' if listed else ''}") from None


def _flags_by_command(command: Any, place: Place = ()) -> dict[Place, set[str]]:
    """The names of the flags of every command."""
    below = getattr(command, "commands", None)
    if below is None:
        options = {parameter.name for parameter in command.params if parameter.param_type_name == "option"}
        return {place: options - {"config", "help"}}
    return {key: names for name, sub in below.items() for key, names in _flags_by_command(sub, (*place, name)).items()}


def _place(ctx: Any) -> Place:
    return () if ctx.parent is None else (*_place(ctx.parent), ctx.info_name)


def _sections(document: dict[str, Any], commands: set[Place], place: Place = ()) -> dict[Place, dict[str, Any]]:
    """The keys at the top and of each table that is named after a command; other tables are values."""
    sections: dict[Place, dict[str, Any]] = {place: {}}
    for key, value in document.items():
        inner = (*place, key)
        if isinstance(value, dict) and any(command[: len(inner)] == inner for command in commands):
            sections |= _sections(value, commands, inner)
        else:
            sections[place][key] = value
    return sections


def _meant(key: str, names: set[str], shown: Callable[[str], str]) -> str:
    close = difflib.get_close_matches(key, names)
    return f"; did you mean {' or '.join(map(shown, close))}?" if close else "; `pagefork COMMAND --help` lists them"


def _flag_name(key: str) -> str:
    return key.replace("_", "-")


def _variable(key: str) -> str:
    return PREFIX + key.upper()

"""Commands whose flags are the fields of a Struct, so that a new setting needs no line here.

A parameter annotated `Annotated[Given, SomeStruct]` becomes one flag per field, named as the field; the command
receives a dict of the fields that were given. Where two Structs have a field of one name, the flag of the second
carries the parameter's name: with `engine: Annotated[Given, EngineConfig]` it is --engine-seed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple, NoReturn, get_args, get_origin

import msgspec
import typer

from pagefork.cli.fields import Field, fields_of
from pagefork.cli.text import one_line
from pagefork.scheduler.errors import PageforkError

Given = dict[str, Any]
REFUSED, INTERRUPTED = 2, 130  # exit codes, as a shell has them


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`: Structs unfolded into flags, errors reported in one line."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters: dict[str, inspect.Parameter] = {}
        groups: dict[str, dict[str, _Flag]] = {}
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            struct = _struct_of(parameter.annotation)
            if struct is None:
                parameters[parameter.name] = parameter
                continue
            groups[parameter.name] = {}
            for flag in _flags(struct, {} if parameter.default is parameter.empty else parameter.default):
                key = f"{parameter.name}_{flag.field}" if flag.field in parameters else flag.field
                groups[parameter.name][key] = flag
                parameters[key] = inspect.Parameter(
                    key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag.annotation(key)
                )

        def run(**values: Any) -> None:
            for group, flags in groups.items():
                given = [(flag, values.pop(key)) for key, flag in flags.items()]
                values[group] = {flag.field: flag.convert(value) for flag, value in given if value is not None}
            with _reported():
                function(**values)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {key: parameter.annotation for key, parameter in parameters.items()}
        run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        app.command(name)(run)
        return function

    return register


@contextmanager
def _reported() -> Iterator[None]:
    """Errors that the user can mend become one line on stderr and an exit code; others keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise  # whoever read the output has gone: typer ends without a word
    except OSError as error:
        _leave(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error), REFUSED)
    except PageforkError as error:
        _leave(str(error), REFUSED)


def _leave(reason: str, code: int) -> NoReturn:
    print(f"pagefork: {one_line(reason)}", file=sys.stderr)
    raise typer.Exit(code) from None


def _struct_of(annotation: Any) -> type[msgspec.Struct] | None:
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, type) and issubclass(extra, msgspec.Struct):
            return extra
    return None


class _Flag(NamedTuple):
    field: str
    kind: Any  # the type that typer shall give
    convert: Callable[[Any], Any]  # from there to what the field holds
    option: dict[str, Any]
    switch: bool  # off by default, so there is no --no-...

    def annotation(self, key: str) -> Any:
        names = [f"--{key.replace('_', '-')}"] if self.switch else []
        return Annotated[self.kind | None, typer.Option(*names, **self.option)]


def _flags(struct: type[msgspec.Struct], defaults: Given) -> Iterator[_Flag]:
    for field in fields_of(struct):
        default = defaults.get(field.name, field.default)
        kind: Any = field.kind
        convert: Callable[[Any], Any] = _itself
        option: dict[str, Any] = {"help": _help(field, default)}
        if get_origin(kind) is dict:
            option |= {"parser": _pair, "metavar": "ID=VALUE"}
            kind, convert = list[Any], dict
        elif get_origin(kind) is list:
            [item] = get_args(kind)
            kind = list[get_args(item)[0] if get_origin(item) is Annotated else item]  # type: ignore[misc]
        elif kind is int and field.optional and default is not None:
            option |= {"parser": _int_or_none, "metavar": "INTEGER|none"}
            kind, convert = Any, lambda value: value[0]
        yield _Flag(field.name, kind, convert, option, switch=kind is bool and not default)


def _help(field: Field, default: Any) -> str:
    """Description, allowed range and default."""
    notes = [field.bounds] if field.bounds else []
    if get_origin(field.kind) in (list, dict):
        notes.append("may be repeated")
    elif default is not None and default is not msgspec.NODEFAULT and field.kind is not bool:
        notes.append(f"default {default}")
    return f"{field.description} ({', '.join(notes)})".strip() if notes else field.description


def _itself(value: Any) -> Any:
    return value


def _pair(text: str) -> tuple[int, float]:
    """`ID=VALUE` as on the command line."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not ID=VALUE, a token id and a number") from None


def _int_or_none(text: str) -> tuple[int | None]:
    """An integer, or `none` where None means something else than not given; boxed to tell them apart."""
    try:
        return (None if text == "none" else int(text),)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither an integer nor none") from None

"""Commands whose flags are the fields of a Struct, so that a new setting needs no line here.

A parameter annotated `Annotated[Given, SomeStruct]` becomes one flag per field, named as the field; the command
receives a dict of the fields that were given. Where two Structs have a field of one name, the flag of the second
carries the parameter's name: with `engine: Annotated[Given, EngineConfig]` it is --engine-seed. A set beside the Struct
names fields that are no flags of this command. Keyword-only parameters of other types are flags themselves.

What is not on the command line comes from the environment, else from the file of --config, else it is not given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import msgspec
import typer

from pagefork.cli.errors import reported
from pagefork.cli.fields import Field, field_of, fields_of
from pagefork.cli.settings import Settings, read_settings
from pagefork.scheduler.params import PRESETS

Given = dict[str, Any]
Command = Callable[..., None]
_CONFIG = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Settings by the names of the flags, in TOML; PAGEFORK_<FLAG> and flags win")
]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Command], Command]:
    """Register a function as a command of `app`: Structs unfolded into flags, errors reported in one line."""

    def register(function: Command) -> Command:
        flags, others = _parameters(function)
        groups = {flag.group for flag in flags.values() if flag.group is not None}
        fields = {key: flag.field for key, flag in flags.items()}

        def run(ctx: typer.Context, config: Path | None = None, **values: Any) -> None:
            with reported():
                layers = read_settings(ctx, config, fields) if groups else []
                layers.append({key: flags[key].convert(values[key]) for key in flags if _on_command_line(ctx, key)})
                call = {key: value for key, value in values.items() if key not in flags or flags[key].group is None}
                call |= {group: {} for group in groups}
                for key, value in _merged(layers).items():
                    (call if (group := flags[key].group) is None else call[group])[fields[key].name] = value
                function(**call)

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_CONFIG)
        parameters = [context, *others, *(flag.parameter for flag in flags.values()), *([config] if groups else [])]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command(name)(run)
        return function

    return register


class _Flag(NamedTuple):
    group: str | None  # the parameter of the command that collects it; None: it is a parameter itself
    field: Field
    convert: Callable[[Any], Any]  # from what typer gives to what the field holds
    parameter: inspect.Parameter


def _parameters(function: Command) -> tuple[dict[str, _Flag], list[inspect.Parameter]]:
    """A function's flags by their names, with dashes as underscores, and its other parameters."""
    flags: dict[str, _Flag] = {}
    others = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        extras = getattr(parameter.annotation, "__metadata__", ())
        struct = next((extra for extra in extras if isinstance(extra, type) and issubclass(extra, msgspec.Struct)), None)
        if struct is not None:
            absent = next((extra for extra in extras if isinstance(extra, set)), set())
            defaults = {} if parameter.default is parameter.empty else parameter.default
            for field in fields_of(struct):
                if field.name not in absent:
                    key = f"{parameter.name}_{field.name}" if field.name in flags else field.name
                    flags[key] = _flag(key, parameter.name, field, defaults.get(field.name, field.default))
        elif parameter.kind is parameter.KEYWORD_ONLY:
            field = field_of(parameter.name, parameter.annotation, parameter.default)
            flags[parameter.name] = _Flag(None, field, _itself, parameter)
        else:
            others.append(parameter)
    return flags, others


def _flag(key: str, group: str, field: Field, default: Any) -> _Flag:
    kind: Any = field.kind
    convert: Callable[[Any], Any] = _itself
    option: dict[str, Any] = {"help": _help(field, default)}
    if get_origin(kind) is dict:
        option |= {"parser": _pair, "metavar": "ID=VALUE"}
        kind, convert = list[Any], dict
    elif get_origin(kind) is list:
        [item] = get_args(kind)
        kind = list[get_args(item)[0] if get_origin(item) is Annotated else item]  # type: ignore[misc]
    elif kind in (int, float) and field.optional:
        option |= {"parser": _number_or_none(kind), "metavar": f"{'INTEGER' if kind is int else 'FLOAT'}|none"}
        kind, convert = Any, lambda value: value[0]
    annotation = Annotated[kind | None, typer.Option(**option)]
    parameter = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    return _Flag(group, field, convert, parameter)


def _on_command_line(ctx: Any, key: str) -> bool:
    """Whether a flag stands on the command line."""
    return bool(ctx.get_parameter_source(key).name == "COMMANDLINE")


def _merged(layers: list[Settings]) -> Settings:
    """Later layers win. A preset also wins over what earlier layers say of the settings that it makes."""
    merged: Settings = {}
    for layer in layers:
        made = PRESETS.get(layer.get("preset", ""), {})
        merged = {key: value for key, value in merged.items() if key not in made} | layer
    return merged


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


def _number_or_none(kind: type[int] | type[float]) -> Callable[[str], tuple[float | None]]:
    """A parser of a number, or of `none`, which undoes what a file says; boxed to tell None from not given."""

    def parse(text: str) -> tuple[float | None]:
        try:
            return (None if text == "none" else kind(text),)
        except ValueError:
            noun = "an integer" if kind is int else "a number"
            raise typer.BadParameter(f"{text!r} is neither {noun} nor none") from None

    return parse

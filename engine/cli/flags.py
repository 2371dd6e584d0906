"""Commands whose flags are the fields of a Struct, so that a new setting needs no line here.

A parameter annotated `Annotated[Given, SomeStruct]` becomes one flag per field, named as the field; the command
receives a dict of the fields that were given. Where two parameters have a field of one name, the flag of the second
carries the parameter's name: with `engine: Annotated[Given, EngineConfig]` it is --engine-seed. A set beside the Struct
names fields that are no flags of this command. Keyword-only parameters of other types are flags themselves.

`Annotated[Given, {"a": A, "b": B}]` stands for the fields of several Structs of which the command takes one: their equal
names share one flag, whose help tells them apart, and the Struct that is taken refuses what it does not have.

What is not on the command line comes from the environment, else from the file of --config, else it is not given. A
function beside the Structs says which names a layer of settings rules out in the layers below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec
import typer
from typer.core import TyperCommand

from pagefork.cli.errors import reported
from pagefork.cli.fields import Field, field_of, fields_of
from pagefork.cli.settings import Settings, read_settings
from pagefork.scheduler.params import PRESETS

Given = dict[str, Any]
Structs = dict[str, type[msgspec.Struct]]
Command = Callable[..., None]
Rule = Callable[[Settings, Settings], Iterable[str]]  # of a layer, and what those below it come to: names to drop from these
_CONFIG = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Settings by the names of the flags, in TOML; PAGEFORK_<FLAG> and flags win")
]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Command], Command]:
    """Register a function as a command of `app`: Structs unfolded into flags, errors reported in one line."""

    def register(function: Command) -> Command:
        flags, others, rules = _parameters(function)
        groups = {flag.group for flag in flags.values() if flag.group is not None}
        fields = {key: flag.fields for key, flag in flags.items()}

        def run(ctx: typer.Context, config: Path | None = None, **values: Any) -> None:
            with reported():
                layers = read_settings(ctx, config, fields) if groups else []
                layers.append({key: flags[key].convert(values[key]) for key in flags if _on_command_line(ctx, key)})
                call = {key: value for key, value in values.items() if key not in flags or flags[key].group is None}
                call |= {group: {} for group in groups}
                for key, value in _merged(layers, rules).items():
                    (call if (group := flags[key].group) is None else call[group])[fields[key][0].name] = value
                function(**call)

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_CONFIG)
        parameters = [context, *others, *(flag.parameter for flag in flags.values()), *([config] if groups else [])]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command(name, cls=_InSections)(run)
        return function

    return register


class _InSections(TyperCommand):
    """Prints the help of flags under the titles of their panels, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            plain = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record := parameter.get_help_record(ctx):
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or plain, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class _Flag(NamedTuple):
    group: str | None  # the parameter of the command that collects it; None: it is a parameter itself
    fields: tuple[Field, ...]  # of each Struct that has one of this name
    convert: Callable[[Any], Any]  # from what typer gives to what the field holds
    parameter: inspect.Parameter


def _parameters(function: Command) -> tuple[dict[str, _Flag], list[inspect.Parameter], list[Rule]]:
    """A function's flags by their names, with dashes as underscores, its other parameters, and its rules."""
    flags: dict[str, _Flag] = {}
    others: list[inspect.Parameter] = []
    rules: list[Rule] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        extras = getattr(parameter.annotation, "__metadata__", ())
        if structs := _structs(parameter.name, extras):
            absent = next((extra for extra in extras if isinstance(extra, set)), set())
            defaults = {} if parameter.default is parameter.empty else parameter.default
            rules += [extra for extra in extras if inspect.isfunction(extra)]
            for name, owners in _by_name(structs, defaults).items():
                if name not in absent:
                    key = f"{parameter.name}_{name}" if name in flags else name
                    option = {"help": _help(owners, structs), "rich_help_panel": _panel(owners, structs)}
                    flags[key] = _flag(key, parameter.name, tuple(owners.values()), option)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            field = field_of(parameter.name, parameter.annotation, parameter.default)
            flags[parameter.name] = _Flag(None, (field,), _itself, parameter)
        else:
            others.append(parameter)
    return flags, others, rules


def _structs(name: str, extras: tuple[Any, ...]) -> Structs:
    """The Structs among the extras of an annotation; a single one is named as the parameter is."""
    for extra in extras:
        if isinstance(extra, type) and issubclass(extra, msgspec.Struct):
            return {name: extra}
        if isinstance(extra, dict):
            return extra
    return {}


def _by_name(structs: Structs, defaults: Given) -> dict[str, dict[str, Field]]:
    """The fields of each name, by the names of the Structs that have it, with the command's defaults."""
    found: dict[str, dict[str, Field]] = {}
    for owner, struct in structs.items():
        for field in fields_of(struct):
            found.setdefault(field.name, {})[owner] = field._replace(default=defaults.get(field.name, field.default))
    return found


def _flag(key: str, group: str, fields: tuple[Field, ...], option: dict[str, Any]) -> _Flag:
    kind: Any
    [(kind, optional)] = {(field.kind, field.optional) for field in fields}  # what differs in type can't share a flag
    convert: Callable[[Any], Any] = _itself
    if get_origin(kind) is dict:
        option |= {"parser": _pair, "metavar": "ID=VALUE"}
        kind, convert = list[Any], dict
    elif get_origin(kind) is list:
        [item] = get_args(kind)
        kind = list[get_args(item)[0] if get_origin(item) is Annotated else item]  # type: ignore[misc]
    elif get_origin(kind) is Literal:
        values = {str(value).lower(): value for value in (*get_args(kind), *([None] if optional else []))}
        kind, convert = Literal[*values], values.__getitem__
    elif kind in (int, float) and optional:
        option |= {"parser": _number_or_none(kind), "metavar": f"{'INTEGER' if kind is int else 'FLOAT'}|none"}
        kind, convert = Any, lambda value: value[0]
    annotation = Annotated[kind | None, typer.Option(**option)]
    parameter = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    return _Flag(group, fields, convert, parameter)


def _on_command_line(ctx: Any, key: str) -> bool:
    """Whether a flag stands on the command line."""
    return bool(ctx.get_parameter_source(key).name == "COMMANDLINE")


def _merged(layers: list[Settings], rules: list[Rule]) -> Settings:
    """Later layers win. A preset also wins over what earlier layers say of the settings that it makes."""
    merged: Settings = {}
    for layer in layers:
        gone = {*PRESETS.get(layer.get("preset", ""), {}), *(name for rule in rules for name in rule(layer, merged))}
        merged = {key: value for key, value in merged.items() if key not in gone} | layer
    return merged


def _panel(owners: dict[str, Field], structs: Structs) -> str:
    """The title of the section of the help."""
    if len(owners) == 1:
        name = next(iter(owners))
        return name.capitalize() if len(structs) == 1 else f"For {name}"
    return "For all" if len(owners) == len(structs) else "For several"


def _help(owners: dict[str, Field], structs: Structs) -> str:
    """Description, allowed range and default; what differs stands after the name of its Struct."""
    told: dict[str, list[str]] = {}
    for owner, field in owners.items():
        told.setdefault(_described(field), []).append(owner)
    if len(told) == 1 and len(owners) in (1, len(structs)):
        return next(iter(told))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in told.items())


def _described(field: Field) -> str:
    notes = [field.bounds] if field.bounds else []
    if get_origin(field.kind) in (list, dict):
        notes.append("may be repeated")
    elif field.default is not None and field.default is not msgspec.NODEFAULT and field.kind is not bool:
        notes.append(f"default {str(field.default).lower() if isinstance(field.default, bool) else field.default}")
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

"""The tables of docs/protocol.md: what stands in a message of the wire, and the limits of a service."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
from msgspec import inspect as kinds

from pagefork import wire
from pagefork.cli.fields import fields_of
from pagefork.limits import Limits


def table(name: str) -> str:
    """What the docstring of a Struct in pagefork.wire says, and its fields as they are encoded."""
    struct = getattr(wire, name)
    described = inspect.cleandoc(struct.__doc__)
    found = kinds.type_info(struct)
    assert isinstance(found, kinds.StructType)
    if not found.fields:
        return f"{described}\n\nNo fields.\n"
    rows = ["| field | type | default |", "|---|---|---|"]
    rows += [f"| `{field.encode_name}` | {_shown(field.type)} | {_default(field)} |" for field in found.fields]
    return f"{described}\n\n" + "\n".join(rows) + "\n"


def limits() -> str:
    """Every limit by the name that Welcome has it under."""
    rows = ["| name | default | of |", "|---|---|---|"]
    rows += [f"| `{field.name}` | {field.default} | {field.description} |" for field in fields_of(Limits)]
    return "\n".join(rows) + "\n"


def _default(field: kinds.Field) -> str:
    if field.required:
        return "required"
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(default, msgspec.Struct):
        return "a map of defaults"
    if isinstance(default, msgspec.Raw):
        default = msgspec.msgpack.decode(default)
    return f"`{_DEFAULTS.get(repr(default), repr(default))}`"


_DEFAULTS = {"None": "nil", "False": "false", "True": "true", "''": '""'}
_SIMPLE: dict[type[kinds.Type], str] = {
    kinds.BoolType: "bool",
    kinds.FloatType: "float",
    kinds.NoneType: "nil",
    kinds.RawType: "anything",
    kinds.AnyType: "anything",
}


def _shown(kind: Any) -> str:
    match kind:
        case kinds.Metadata():
            return _shown(kind.type)
        case kinds.IntType():
            return "int" + _range(kind.ge, kind.le)
        case kinds.StrType():
            return "str" + (f" `{_pattern(kind.pattern)}`" if kind.pattern else _longest(kind.max_length, "characters"))
        case kinds.BytesType():
            return "bin" + _longest(kind.max_length, "bytes")
        case kinds.ListType():
            item = _shown(kind.item_type)
            shown = f"({item})" if isinstance(kind.item_type, kinds.UnionType) else item
            return f"array of {shown}" + _longest(kind.max_length, "entries")
        case kinds.DictType():
            return f"map of {_shown(kind.key_type)} to {_shown(kind.value_type)}"
        case kinds.StructType():
            return f"[{kind.cls.__name__}](#{kind.cls.__name__.lower()})"
        case kinds.UnionType():
            return " or ".join(map(_shown, kind.types))
        case _:
            return _SIMPLE[type(kind)]


def _pattern(pattern: str) -> str:
    return pattern.replace(r"\A", "^").replace(r"\Z", "$")


def _longest(most: int | None, of: str) -> str:
    return "" if most is None else f", at most {most} {of}"


def _range(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return ""
    exponent = (high + 1).bit_length() - 1
    return f" from {low if low >= 0 else f'-2^{(-low).bit_length() - 1}'} to 2^{exponent} - 1"

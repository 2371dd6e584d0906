"""What a Struct says of its fields: type, default, allowed range and description, for flags and for the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Field(NamedTuple):
    """`kind` is the type of `hint` without None and without annotations; the default of a required field is msgspec.NODEFAULT."""

    name: str
    hint: Any
    kind: Any
    optional: bool
    default: Any
    description: str
    bounds: str  # e.g. "> 0, <= 1"; bounds that only keep a number from being absurd are left out

    @property
    def type_name(self) -> str:
        """The type as a reader would write it."""
        if get_origin(self.kind) is Literal:
            name = " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in get_args(self.kind))
        elif arguments := [_unwrap(argument)[0].__name__ for argument in get_args(self.kind)]:
            name = f"{get_origin(self.kind).__name__}[{', '.join(arguments)}]"
        else:
            name = self.kind.__name__
        return f"{name} or None" if self.optional else name


def fields_of(struct: type[msgspec.Struct]) -> Iterator[Field]:
    """The fields in their order, but for those that hold a function."""
    hints = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        found = field_of(field.name, hints[field.name], default)
        if found.kind in (bool, int, float, str) or get_origin(found.kind) in (list, dict, Literal):
            yield found


def field_of(name: str, hint: Any, default: Any) -> Field:
    """What an annotation says of a value."""
    kind, metas, optional = _unwrap(hint)
    if optional and metas and get_origin(hint) is Annotated:
        hint = Annotated[kind, *metas] | None  # a bound is the number's, not that of None
    description = "".join(meta.description or "" for meta in metas)
    return Field(name, hint, kind, optional, default, description, _bounds(metas))


def _bounds(metas: list[Meta]) -> str:
    bounds = [(sign, getattr(meta, name)) for meta in metas for name, sign in _BOUNDS.items()]
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None and bound < 2**20)


def _unwrap(hint: Any) -> tuple[Any, list[Meta], bool]:
    """The type inside Annotated[...] and `| None`, the Metas met on the way, and whether None is allowed.

    A union of bool and Literals comes as the Literal of all their values.
    """
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        inner, metas, optional = _unwrap(kind)
        return inner, metas + [extra for extra in extras if isinstance(extra, Meta)], optional
    if get_origin(hint) in (Union, UnionType):
        kind, *others = [arm for arm in get_args(hint) if arm is not NoneType]
        if others:
            kind = Literal[*(value for arm in (kind, *others) for value in ((True, False) if arm is bool else get_args(arm)))]
        inner, metas, _ = _unwrap(kind)
        return inner, metas, NoneType in get_args(hint)
    return hint, [], False

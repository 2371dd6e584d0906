"""Checked Structs: unknown names and values out of range are refused with errors that say what is allowed."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from .errors import PageforkError


class CheckedMeta(msgspec.StructMeta):
    """Refuses unknown field names on construction.

    Classes name their `error`, and what to say of `foreign` names that people try.
    """

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        owner: Any = cls
        for name in fields:
            if name not in owner.__struct_fields__:
                known = owner.foreign.get(name) or f"it has {', '.join(owner.__struct_fields__)}"
                raise owner.error(f"{owner.__name__} has no {owner.noun} {name!r}; {known}")
        try:
            return super().__call__(*args, **fields)
        except TypeError as error:
            raise owner.error(f"{owner.__name__}: {error}; name every {owner.noun}") from None


class Checked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=CheckedMeta):
    """A Struct whose annotations are checked on construction as they are on decoding."""

    error: ClassVar[type[PageforkError]]
    foreign: ClassVar[dict[str, str]]
    noun: ClassVar[str]

    def check_fields(self) -> None:
        """Raise `error` for the first field whose value its annotation does not allow."""
        for name, kind, default in _fields(type(self)):
            value = getattr(self, name)
            if value is not default and (reason := _refusal(value, kind)):
                shown = repr(value)
                raise self.error(
                    f"{type(self).__name__}: {name}={shown if len(shown) <= 80 else shown[:77] + '...'} is refused: {reason}"
                )


def fits_float32(value: float) -> bool:
    """Whether a number other than 0 stays finite and different from 0 as a 32-bit float."""
    return 1.2e-38 < abs(value) < 3.4e38


_FIELDS: dict[type, list[tuple[str, Any, Any]]] = {}


def _fields(cls: Any) -> list[tuple[str, Any, Any]]:
    if cls not in _FIELDS:
        hints = get_type_hints(cls, include_extras=True)
        defaults = {field.name: field.default for field in msgspec.structs.fields(cls)}
        _FIELDS[cls] = [(name, hints[name], defaults[name]) for name in cls.__struct_fields__]
    return _FIELDS[cls]


def _refusal(value: Any, kind: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "it is not a finite number"
    if isinstance(value, float) and value and not fits_float32(value):
        return "it does not fit a 32-bit float, which is what is computed with"
    if "Callable" in repr(kind):
        several = any(get_origin(part) is Sequence for part in get_args(kind))
        if value is None or (all(map(callable, value)) if several and isinstance(value, list | tuple) else callable(value)):
            return None
        return "it is a list of callables" if several else "it is not callable"
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        choices = _choices(kind)
        return f"it is one of {', '.join(map(repr, choices))}" if choices else str(error)
    return None


def _choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal or a bool, which may be annotated or optional; none where other values are allowed too."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) is Annotated:
        return _choices(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        found = [_choices(part) for part in get_args(kind) if part is not types.NoneType]
        return tuple(itertools.chain(*found)) if all(found) else ()
    return (True, False) if kind is bool else ()

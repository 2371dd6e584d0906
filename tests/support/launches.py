"""Every launch of a kernel is checked against the configurations that are compiled ahead of time.

A module's `variants()` must list what is launched: the same types but for the width of integers, the same flags, and
sizes that are at least as large. Smaller sizes are for tests. Where None is given, the flags see to it that nothing is read.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch

import pagefork.kernels
from pagefork.kernels import _triton
from pagefork.kernels._triton import Variant

_FLOATS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}


@cache
def known() -> dict[int, list[Variant]]:
    """The variants of all modules, by the identity of their kernels."""
    found: dict[int, list[Variant]] = defaultdict(list)
    for info in iter_modules(pagefork.kernels.__path__):
        module = import_module(f"pagefork.kernels.{info.name}")
        for variant in module.variants() if hasattr(module, "variants") else ():
            found[id(variant.kernel)].append(variant)
    return found


def check_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a launch that no variant covers raises AssertionError."""
    listed, launch = known(), _triton.launch

    def checked(
        kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, registers: int | None = None, **constants: Any
    ) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        same = [variant for variant in listed[id(kernel)] if _same_types(variant, given)]
        exact = [variant for variant in same if all(given[name] == value for name, value in variant.constants.items())]
        if exact:
            covered = any((warps, registers) == (variant.warps, variant.registers) for variant in exact)
        else:
            covered = any(_no_larger(variant, given) for variant in same)
        kinds = {name: _kind(value) if name not in constants else value for name, value in given.items()}
        assert covered, f"variants() does not list {kernel.__name__} with {kinds}, {warps} warps and {registers} registers"
        launch(kernel, grid, *args, warps=warps, registers=registers, **constants)

    for name, module in list(sys.modules.items()):
        if name.startswith("pagefork.") and getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", checked)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _FLOATS.get(value.dtype, "*int")
    return type(value).__name__


def _same_types(variant: Variant, given: dict[str, Any]) -> bool:
    if {*variant.types, *variant.constants} != given.keys():
        return False
    return all(_kind(given[name]) in (_listed_kind(kind), "NoneType") for name, kind in variant.types.items())


def _listed_kind(kind: str) -> str:
    """Triton's type in the words of `_kind`."""
    if kind.lstrip("*")[0] in "iu":
        return "*int" if kind[0] == "*" else "int"
    return kind if kind[0] == "*" else "float"


def _no_larger(variant: Variant, given: dict[str, Any]) -> bool:
    """Whether flags are the same and sizes at most those of the variant."""
    pairs = ((given[name], value) for name, value in variant.constants.items())
    return all(found <= value if type(value) is int and type(found) is int else found == value for found, value in pairs)

"""Triton where it is of use, what its kernels share, and when they run.

On a CUDA device the kernels run as compiled; with TRITON_INTERPRET=1 in the environment Triton's interpreter runs them
on CPU tensors, slowly and exactly as written, which is how they are tested without a GPU. Everything else goes
through the torch references, and processes without a GPU do not load Triton, unless they did so before to compile kernels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

try:
    if not (torch.cuda.is_available() or "triton" in sys.modules or os.environ.get("TRITON_INTERPRET")):
        raise ImportError("its kernels could not run")
    import triton
    import triton.language as tl

    INTERPRETED: bool = triton.knobs.runtime.interpret
    constant: Callable[[Any], Any] = tl.constexpr
except ImportError:  # nor does every platform have it
    tl = None
    INTERPRETED = False

    def constant(value: Any) -> Any:
        return value


__all__ = ["INTERPRETED", "Variant", "constant", "fused", "fused_on", "jit", "launch", "need_kernels", "power_of_two", "tl"]


@overload
def jit(fn: Callable[..., Any]) -> Any: ...


@overload
def jit(*, changing: Sequence[str]) -> Callable[[Callable[..., Any]], Any]: ...


def jit(fn: Callable[..., Any] | None = None, *, changing: Sequence[str] = ()) -> Any:
    """Makes a kernel, or a function that kernels call.

    Triton compiles a kernel again for a number that is 1 or a multiple of 16, and for a pointer to a multiple of 16 bytes. Of
    arguments that are `changing` from call to call it does not: no step waits for a compiler because of their values.
    """
    return partial(_compiled, changing=changing) if fn is None else _compiled(fn, changing)


def _compiled(fn: Callable[..., Any], changing: Sequence[str]) -> Any:
    if tl is None:
        return fn
    return triton.jit(fn, do_not_specialize=changing, do_not_specialize_on_alignment=changing)


def fused_on(device: torch.device) -> bool:
    """Whether operations on a device go through Triton kernels."""
    return INTERPRETED or (device.type == "cuda" and tl is not None)


def fused(x: Tensor) -> bool:
    """Whether operations on `x` go through Triton kernels."""
    return fused_on(x.device)


def need_kernels(x: Tensor) -> None:
    """Raises ValueError where no kernel runs on `x`, of what has no other way."""
    if not fused(x):
        raise ValueError(f"records of groups are read by Triton kernels: they need a CUDA device with Triton, not {x.device}")


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


class Variant(NamedTuple):
    """A configuration of a kernel that is launched in practice: what compiling it ahead of time needs.

    types: Triton's types of the arguments that are not constants ("*bf16", "i32", "fp32"), by name and in order. least: the
    first compute capability on which it is launched (90: sm_90).
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    registers: int | None = None
    least: int = 80


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, registers: int | None = None, **constants: Any
) -> None:
    """Runs a kernel. Multiplications and additions are never fused: what a program computes is what it says.

    registers: how many a thread may take at most. Without a limit the assembler may prefer to spill some.
    """
    if 0 not in grid:
        kernel[grid](*args, **constants, num_warps=warps, maxnreg=registers, enable_fp_fusion=False)

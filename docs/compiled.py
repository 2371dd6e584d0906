"""Compile the Triton kernels ahead of time and write what they take: `python docs/compiled.py [--check]`.

It needs no GPU. The table stands in kernels.md between `<!-- compiled -->` and `<!-- end -->`.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import groupby
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

import triton

import pagefork.kernels
from pagefork.kernels._triton import Variant

DOCUMENT = Path(__file__).parent / "kernels.md"
CAPABILITIES = (80, 90)
MARKED = re.compile(r"(<!-- compiled -->\n).*?(<!-- end -->)", re.DOTALL)
ALIGNED = ("stride", "vocab", "capacity", "width")  # ends of the names of sizes that are multiples of 16 in practice


class Footprint(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    registers: int  # of each thread
    shared: int  # bytes of each program
    stack: int  # bytes of each thread; registers that are spilled lie there too


def modules() -> list[str]:
    """The modules of kernels/ that say what they launch."""
    names = [found.name for found in iter_modules(pagefork.kernels.__path__)]
    return [name for name in names if hasattr(import_module(f"pagefork.kernels.{name}"), "variants")]


def variants(module: str) -> list[Variant]:
    found: list[Variant] = list(import_module(f"pagefork.kernels.{module}").variants())
    return found


def largest(module: str) -> list[Variant]:
    """Of every choice of flags the variant with the largest sizes, for bfloat16 where a kernel takes several types."""
    found = variants(module)
    typed = {id(variant.kernel) for variant in found if "*bf16" in variant.types.values()}
    best: dict[tuple[object, ...], tuple[int, Variant]] = {}
    for variant in found:
        if id(variant.kernel) in typed and "*bf16" not in variant.types.values():
            continue
        size = math.prod(value for value in variant.constants.values() if type(value) is int)
        flags = tuple(value for value in variant.constants.values() if type(value) is not int)
        key = id(variant.kernel), tuple(variant.types.values()), flags
        if key not in best or size > best[key][0]:
            best[key] = size, variant
    return [variant for _, variant in best.values()]


def footprint(variant: Variant, capability: int) -> Footprint:
    """Compiles for `capability` (90: sm_90) as a launch would, given aligned pointers and sizes.

    Triton keeps what it compiles in $TRITON_CACHE_DIR. Raises ValueError where names are not those of the kernel, in order.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    if [*variant.types, *variant.constants] != names:
        raise ValueError(f"the variant of {variant.kernel.__name__} has {[*variant.types, *variant.constants]}, not {names}")
    changing = {param.name for param in variant.kernel.params if param.do_not_specialize_on_alignment}
    aligned = [name not in changing and (kind[0] == "*" or name.endswith(ALIGNED)) for name, kind in variant.types.items()]
    source = ASTSource(
        fn=variant.kernel,
        signature={**variant.types, **dict.fromkeys(variant.constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place, holds in enumerate(aligned) if holds},
    )
    options = {"num_warps": variant.warps, "maxnreg": variant.registers, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    return Footprint(int(registers), compiled.metadata.shared, int(stack))


def row(module: str, variant: Variant, found: dict[int, Footprint]) -> str:
    """A row of the table."""
    name = f"{module}.{variant.kernel.__name__}"
    kinds = dict.fromkeys(kind[1:] for kind in variant.types.values() if kind in ("*bf16", "*fp16", "*fp32"))
    constants = [f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in variant.constants.items()]
    settings = " ".join([next(iter(kinds), ""), *constants]).strip()
    taken = [found.get(capability, ("–",) * 3) for capability in CAPABILITIES]
    cells = [" / ".join(str(number) for number in column) for column in zip(*taken, strict=True)]
    return f"| `{name}` | {settings} | {variant.warps} | {' | '.join(cells)} |"


def footprints(variant: Variant) -> dict[int, Footprint]:
    """By capability, where it is launched."""
    return {capability: footprint(variant, capability) for capability in CAPABILITIES if capability >= variant.least}


def compiled_row(module: str, variant: Variant) -> str:
    return row(module, variant, footprints(variant))


def table() -> Iterator[str]:
    """Lines of the table; compiles on all cores."""
    targets = " / ".join(f"sm_{capability}" for capability in CAPABILITIES)
    yield f"Compiled by Triton {triton.__version__} for {targets}, as the numbers stand."
    yield ""
    yield "| kernel | configuration | warps | registers | shared memory, bytes | stack and spills, bytes |"
    yield "|---|---|---|---|---|---|"
    jobs = [(module, index) for module in modules() for index in range(len(largest(module)))]
    with ProcessPoolExecutor() as pool:
        rows = pool.map(_row_of, jobs)
        yield from (same for same, _ in groupby(rows))


def _row_of(job: tuple[str, int]) -> str:
    module, index = job
    return compiled_row(module, largest(module)[index])


def main() -> None:
    old = DOCUMENT.read_text()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        lines = "\n".join(table()) + "\n"
    new = MARKED.sub(lambda match: match[1] + lines + match[2], old)
    if new != old and "--check" in sys.argv:
        sys.exit(f"stale: {DOCUMENT.name}; run `make tables`")
    DOCUMENT.write_text(new)


if __name__ == "__main__":
    main()

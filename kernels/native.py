"""The native library: kernels in C++ for CPUs, where the package was built with a compiler.

It is loaded by ctypes, which lets other Python threads run while it computes. The environment variable PAGEFORK_NATIVE
chooses: "off", or the instruction set to use ("avx512_bf16", "avx512", "avx2", "neon", "scalar"; one that the machine
lacks is passed over for its best).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

logger = logging.getLogger("pagefork")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None: switched off, not built, or not to be loaded here."""
    if os.environ.get("PAGEFORK_NATIVE") == "off":
        return None
    built = _built(Path(__file__).parent / "csrc")
    if built is None:
        return None
    import torch  # noqa: F401  # its OpenMP runtime, whose threads the library computes on

    try:
        lib = ctypes.CDLL(str(built), mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        logger.warning("the native library can't be loaded, torch computes instead: %s", error)
        return None
    lib.pagefork_isa.restype = ctypes.c_char_p
    return lib


def _built(folder: Path) -> Path | None:
    """The newest library in a folder, unless it is older than sources beside it: its structures may be others than ours."""
    built = max(folder.glob("_native*.so"), key=_time, default=None)
    if built is not None and any(_time(path) > _time(built) for path in folder.iterdir()):
        logger.warning("%s is older than its sources, so torch computes instead: install the package again to build it", built)
        return None
    return built


def _time(path: Path) -> float:
    return path.stat().st_mtime


def native_isa() -> str | None:
    """The instruction set that the library computes with; None without it."""
    lib = library()
    return None if lib is None else str(lib.pagefork_isa().decode())

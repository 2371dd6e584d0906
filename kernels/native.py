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
    built = max((Path(__file__).parent / "csrc").glob("_native*.so"), key=lambda path: path.stat().st_mtime, default=None)
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


def native_isa() -> str | None:
    """The instruction set that the library computes with; None without it."""
    lib = library()
    return None if lib is None else str(lib.pagefork_isa().decode())

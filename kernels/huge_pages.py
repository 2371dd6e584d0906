"""Memory for weights of the native kernels, on huge pages where the system has them: a token reads all of it once."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_CHUNK = 16 * HUGE_PAGE  # mapped at once; pages that nobody writes to take no memory
_LINE = 64

_lock = threading.Lock()
_chunk = torch.empty(0, dtype=torch.uint8)  # what is left of the last one


def allocate(nbytes: int) -> Tensor:
    """uint8 [nbytes], its address a multiple of 64. Weights share pages; a page is freed with the last of them."""
    global _chunk  # noqa: PLW0603  # one heap for the process, like any other
    size = -(-nbytes // _LINE) * _LINE
    with _lock:
        if len(_chunk) < size:
            _chunk = mapped(max(size, _CHUNK))
        found, _chunk = _chunk[:nbytes], _chunk[size:]
    return found


def mapped(size: int) -> Tensor:
    """At least so many bytes, whole huge pages."""
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    if advice := getattr(mmap, "MADV_HUGEPAGE", None):
        with contextlib.suppress(OSError):  # of a kernel that is built without huge pages
            pages.madvise(advice, start, size)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=start, count=size)

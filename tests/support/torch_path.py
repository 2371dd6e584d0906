"""Models that torch computes on a CPU, as where the native library is not built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def torch_path() -> Iterator[None]:
    """Inside, linear layers and decoders are made, and attention is computed, without the native library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagefork.kernels.linear.native_linear", lambda *_: False)
        patch.setattr("pagefork.kernels.paged_attention.native_attention", lambda *_: False)
        yield

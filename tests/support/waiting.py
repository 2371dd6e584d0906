"""Whether the host waits for the device: on CUDA as torch tells, on a CPU by the operations that would make it wait."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagefork.kernels import _triton

# What needs a value of a tensor on the host, or makes a tensor whose shape depends on one.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _NoWaiting(TorchDispatchMode):
    """Raises AssertionError at an operation for which the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in _INDEXES and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        assert name not in _WAITS and not masks, f"the host would wait for {name}"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """In here the host may launch what it likes and wait for nothing. What kernels do when they are interpreted is left out."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    launched: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            launch = getattr(module, "launch", None) if name.startswith("pagefork.kernels.") else None
            if launch is not None and module is not _triton:
                patch.setattr(module, "launch", _outside(launch))
                launched.append(True)
        with _NoWaiting():
            yield
    assert launched


def _outside(launch: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            launch(*args, **kwargs)

    return run

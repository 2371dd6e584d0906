"""Recording what is launched, to launch it again at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Outputs = TypeVar("Outputs")


class Capture(Protocol):
    """Records what `run` launches. Returns what launches it again, and what `run` returned: each replay fills that anew."""

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]: ...


class CudaCapture:
    """Records CUDA graphs, on a stream and in a memory pool of their own: none of them may run beside another.

    `run` is called twice: kernels are compiled and libraries set up before anything is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # to free memory of the device is not allowed meanwhile
        try:
            # What other threads ask of the device may not end up in the graph, and need not wait for it.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()
        finally:
            if collecting:
                gc.enable()
        return graph.replay, outputs

"""How the memory of a GPU is shared out: what is left after the weights and the needs of a step goes to the cache.

      free memory once the weights are there
    - what a step takes at most, as measured by running one (cache_size.py)
    - what captured graphs hold: buffers, and a pool of their own that keeps what a decoding step takes
    - a margin, for fragments, kernels that are loaded later and the histories of tokens
    = the cache

Decisions are functions of measured numbers, and `Memory` is all that they know of the device. So tests without a GPU cover
them, with a Memory that says what they want and functions that raise torch.OutOfMemoryError as its allocator does;
`CudaMemory` itself runs on a GPU only.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from pagefork.scheduler.errors import ConfigError

_MARGIN = 0.03  # of all memory that the device has
_LEAST_MARGIN = 256 << 20


class Memory(Protocol):
    """The memory of a device, in bytes."""

    @property
    def total(self) -> int:
        """What the device has."""

    def free(self) -> int:
        """What nobody holds, other processes included."""

    def begin(self) -> None:
        """From here on `peak` counts."""

    def peak(self) -> int:
        """The most that was held at a time since `begin`, beyond what was held then."""


class CudaMemory:
    """That of a CUDA device, as the driver and torch's allocator tell it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocated = self._reserved = 0

    @property
    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def free(self) -> int:
        """What torch keeps for later is given back first."""
        gc.collect()  # cycles may hold tensors
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def begin(self) -> None:
        self.free()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._allocated = torch.cuda.memory_allocated(self._device)
        self._reserved = torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        """Counts fragments as well: what torch took of the device, where that is more than what it gave to tensors."""
        torch.cuda.synchronize(self._device)
        return max(
            torch.cuda.max_memory_allocated(self._device) - self._allocated,
            torch.cuda.max_memory_reserved(self._device) - self._reserved,
        )


class Needs(NamedTuple):
    """What is needed beside weights and cache, in bytes."""

    step: int  # at most, by any step
    graphs: int = 0

    def __str__(self) -> str:
        graphs = f" and the captured graphs about {self.graphs}" if self.graphs else ""
        return f"a step takes up to {self.step} bytes{graphs}"

    @property
    def advice(self) -> str:
        return "lower max_num_batched_tokens or max_num_seqs" + (", or set cuda_graphs=False" if self.graphs else "")


def cache_room(free: int, total: int, needs: Needs, least: int) -> int:
    """Bytes for a cache of whose size nothing is said. Raises ConfigError if fewer than `least` are left."""
    margin = max(int(total * _MARGIN), _LEAST_MARGIN)
    room = free - needs.step - needs.graphs - margin
    if room < least:
        raise ConfigError(
            f"too little memory is left for a cache: of the {free} bytes that are free beside the weights, {needs}, "
            f"and {margin} are kept back; {needs.advice}"
        )
    return room


def check_cache(setting: str, size: int, free: int, needs: Needs) -> None:
    """Raises ConfigError if a cache of `size` bytes, for which `setting` asks, leaves less than what is needed."""
    room = free - needs.step - needs.graphs
    if size > room:
        raise ConfigError(
            f"{setting} makes a cache of {size} bytes, but {free} are free beside the weights and {needs}: "
            f"lower it to at most {max(0, room)} bytes, or {needs.advice}"
        )


def check_weights(size: int, free: int, dtype: torch.dtype) -> None:
    """Raises ConfigError if weights of `size` bytes in `dtype` are more than what is free."""
    if size > free:
        raise ConfigError(f"the weights take {size} bytes, but {free} are free on the device: {weights_advice(dtype)}")


def weights_advice(dtype: torch.dtype) -> str:
    """What to do about weights that do not fit."""
    return "choose a smaller model" + (" or dtype='bfloat16'" if dtype.itemsize > 2 else "")


@contextmanager
def running_out(memory: Memory, doing: str, advice: str) -> Iterator[None]:
    """Within, running out of memory is a ConfigError that says what was done, the bytes, and what to change."""
    free = memory.free()
    memory.begin()
    try:
        yield
    except RuntimeError as error:
        if not _ran_out(error):
            raise
        raise ConfigError(
            f"{doing} ran out of memory: {free} bytes were free on the device, {memory.peak()} were taken and more was needed; "
            f"{advice}"
        ) from error


def _ran_out(error: RuntimeError) -> bool:
    """Torch's allocator has an error of its own; the driver and libraries that allocate by themselves say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error)

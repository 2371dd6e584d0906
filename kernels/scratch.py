"""The form in which logits are worked on, and memory for it that is used again from call to call.

On a CPU the first touch of a fresh page costs more than the work on it, and an allocator gives large blocks back
to the system; on a GPU the caching allocator does the same job and this does no harm.
"""

from __future__ import annotations

import itertools
import math
import threading

import torch
from torch import Tensor

GROUP = 64  # columns are padded to whole groups of this many tokens
CHUNK = 1 << 22  # logits worked on at once on a CPU: bounds memory; with less, calls cost more than the cache gives
SLICE = 3 << 17  # numbers widened to 8 bytes at once: two threads' parts fit their caches


class Scratch:
    """Named buffers that grow. A buffer's next `take` overwrites it, so its users must not overlap."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of undefined content."""
        key, size = (name, dtype, device), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # what is made in inference mode could not be written to outside of it
                buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def like(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `take`, with the shape, device and (unless given) type of `values`."""
        return self.take(name, values.shape, dtype or values.dtype, values.device)

    def rows(self, name: str, values: Tensor, rows: Tensor) -> Tensor:
        """The rows of `values` [B, W] marked in bool [B], in order; `values` itself where all are."""
        if bool(rows.all()):
            return values
        index = rows.nonzero()[:, 0]
        out = self.take(name, (len(index), values.shape[1]), values.dtype, values.device)
        return torch.index_select(values, 0, index, out=out)


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()


_PER_THREAD = _PerThread()


def thread_scratch(device: torch.device) -> Scratch:
    """On a CPU the calling thread's own, for work that ends before its caller returns; a new one elsewhere.

    It keeps some buffers of CHUNK numbers: whether an allocator would is a matter of what a program freed before.
    """
    return _PER_THREAD.scratch if device.type == "cpu" else Scratch()


def widened(logits: Tensor, scratch: Scratch) -> Tensor:
    """Contiguous fp32 [B, W], W the next multiple of GROUP, padded with -inf. May share memory with `logits`.

    One width per vocabulary makes every sum below independent of the batch, and lets a row be read in whole groups.
    Uses the buffer "values".
    """
    logits = logits.detach()
    rows, vocab = logits.shape
    if vocab % GROUP == 0 and logits.dtype == torch.float32 and logits.is_contiguous():
        return logits
    wide = scratch.take("values", (rows, -(-vocab // GROUP) * GROUP), torch.float32, logits.device)
    wide[:, vocab:] = -torch.inf
    wide[:, :vocab] = logits
    return wide


def chunks(rows: int, vocab: int, device: torch.device) -> list[slice]:
    """Even slices of `rows` that fit the cache on a CPU; one slice elsewhere. No result depends on the split."""
    return _slices(rows, vocab, device, CHUNK)


def wide_chunks(values: Tensor) -> list[slice]:
    """As `chunks`, of the rows of `values` [B, W], for work in 8 bytes per entry."""
    rows, columns = values.shape
    return _slices(rows, columns, values.device, SLICE)


def _slices(rows: int, columns: int, device: torch.device, size: int) -> list[slice]:
    parts = max(1, min(rows, -(-rows * columns // size))) if device.type == "cpu" else 1
    edges = [rows * part // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges)]

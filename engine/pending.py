"""What the read-outs of a step found, on its way from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels._triton import fused_on
from pagefork.scheduler.plan import Longs, Reads

Columns = dict[str, Tensor]  # fields of Reads by name; and "emptied", bool [P]: bad though the model's logits are good


class Pending(NamedTuple):
    """The Reads of one probe, still on the device, and what it takes to say why an entry is bad."""

    columns: Columns
    processors: Longs  # [P], the number of each entry's own logits processors
    failures: Mapping[int, str]  # by such a number, those of the step

    def reads(self, arrays: dict[str, NDArray[Any]]) -> Reads:
        """arrays: the columns."""
        fields: dict[str, Any] = dict(arrays)
        emptied = fields.pop("emptied")
        reads = Reads(**fields)
        if reads.bad.any():
            reads.why = {i: self._why(int(self.processors[i])) for i in emptied.nonzero()[0].tolist()}
        return reads

    def _why(self, number: int) -> str:
        """What left nothing of a row of good logits."""
        if number in self.failures:
            return f"a logits processor failed: {self.failures[number]}"
        return "its bans, logit_bias, penalties or logits processors left no token to draw"


class Fetch:
    """The columns of several probes. They leave the device in one piece, and the host waits for them once."""

    def __init__(self, pending: Sequence[Pending], device: torch.device) -> None:
        """Launches what is needed and waits for nothing."""
        self._pending = pending
        self._columns = [column for one in pending for column in one.columns.values()]
        self._left = _Leaving(packed(self._columns, device)) if fused_on(device) else None

    def reads(self) -> list[Reads]:
        """One of each probe. Waits for the device, even where nothing was asked: else steps of prompts would pile up there."""
        if self._left is None:
            arrays = iter([column.numpy() for column in self._columns])
        else:
            arrays = iter(unpacked(self._left.arrived(), self._columns))
        return [one.reads({name: next(arrays) for name in one.columns}) for one in self._pending]


class _Leaving:
    """Bytes on their way to the host; from a GPU through page-locked memory, as nothing else is copied without waiting."""

    def __init__(self, data: Tensor) -> None:
        self._data, self._event = data, None
        if data.is_cuda:
            self._data = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
            self._data.copy_(data, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(data.device))

    def arrived(self) -> NDArray[np.uint8]:
        """Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        array: NDArray[np.uint8] = self._data.numpy()
        return array.copy() if self._event is not None else array  # page-locked memory is not for keeping


def packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of all tensors, which are on `device`, one after another, uint8 [N]."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


def unpacked(data: NDArray[np.uint8], tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Arrays like `tensors`, of whose shapes and types alone use is made, with the bytes that `packed` gave."""
    arrays, begin = [], 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
        arrays.append(data[begin:end].view(kind).reshape(tensor.shape))
        begin = end
    return arrays

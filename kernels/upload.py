"""Host arrays on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """`values` on the device, in order with what is computed there. The host does not wait; on a CPU they share memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only page-locked memory is copied without waiting
    return tensor.to(device, non_blocking=True)


def upload_index(values: NDArray[Any], device: torch.device) -> Tensor:
    """As int64, which indexing takes."""
    return upload(values.astype(np.int64, copy=False), device)


def staging(words: int, device: torch.device) -> Tensor:
    """int32 [words] of the host, of undefined content: to be filled, and copied to the device without waiting.

    Torch does not hand out its memory again before copies out of it are done.
    """
    return torch.empty(words, dtype=torch.int32, pin_memory=device.type == "cuda")

"""The blocks of every slot's sequence: on the host, and where kernels run on the device too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagefork.kernels._triton import fused_on
from pagefork.kernels.copy_rows import copy_rows
from pagefork.kernels.upload import upload, upload_index
from pagefork.scheduler.plan import Forks, Ints, Tables


class BlockTables:
    """host: int32 [slots, columns]; device: the same there, None where no kernel walks it."""

    def __init__(self, max_slots: int, columns: int, device: torch.device) -> None:
        self.host: Ints = np.zeros((max_slots, columns), np.int32)
        self.device: Tensor | None = None
        if fused_on(device):
            self.device = torch.zeros(max_slots, columns, dtype=torch.int32, device=device)

    def fork(self, forks: Forks) -> None:
        """Slots become copies of others; every source is read before any slot is written."""
        if len(forks.src) == 0:
            return
        self.host[forks.dst] = self.host[forks.src]
        if self.device is not None:
            copy_rows(self.device, *upload_index(np.stack((forks.src, forks.dst)), self.device.device))

    def write(self, tables: Tables) -> None:
        """Entries that changed. Where one is named twice, the last counts."""
        if len(tables.slot) == 0:
            return
        self.host[tables.slot, tables.column] = tables.block
        if self.device is not None:
            # The device writes in any order: what the host found is the same for all that name one entry.
            place = tables.slot.astype(np.int64) * self.host.shape[1] + tables.column
            block = self.host[tables.slot, tables.column]
            sent = upload(np.stack((place, block)), self.device.device)
            self.device.view(-1)[sent[0]] = sent[1].int()

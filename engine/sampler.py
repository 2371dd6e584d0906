"""Reads logits: draws tokens and looks up the most probable ones, for the probes of a plan.

Log-probs are the model's own (before bans, bias, penalties and temperature) unless a spec asks for the processed
distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels._triton import fused
from pagefork.kernels.upload import upload_index
from pagefork.scheduler.plan import Forks, Kind, Opens, Probe, Rows, Spec

from .custom_logits import LogitsProcessors
from .fused_draw import DrawEntries, Drawn
from .fused_reads import FusedReads
from .native_reads import NativeReads
from .pending import Pending
from .slot_state import SlotState
from .torch_reads import TorchReads


class Sampler:
    """The state by slot that reading logits needs, and the read-outs."""

    def __init__(self, max_slots: int, vocab_size: int, max_len: int, device: torch.device) -> None:
        self.held = torch.zeros(max_slots + 1, dtype=torch.int64, device=device)  # `last`, and one that padding draws for
        self.last = self.held[:max_slots]  # the token drawn last; 0 after a bad row
        self.processors = LogitsProcessors(vocab_size)
        self._state = SlotState(max_slots, vocab_size, max_len, device, self.processors, fused(self.last))
        self._torch = TorchReads(self._state, vocab_size, device)
        self._native = NativeReads(self._state)
        self._fused = FusedReads(self._state, vocab_size, device) if fused(self.last) else None
        self._vocab_size, self._device = vocab_size, device

    def fork(self, forks: Forks) -> None:
        """Slots become copies of others, all but the stream; every source is read before any slot is written."""
        if len(forks.src):
            self._state.fork(forks)
            src, dst = (upload_index(slots, self._device) for slots in (forks.src, forks.dst))
            self.last[dst] = self.last[src]

    def open(self, opens: Opens, specs: list[Spec]) -> None:
        """Slots start afresh. Raises ValueError for a token id outside of the vocabulary."""
        if len(opens.slot):
            self._state.open(opens, specs)

    def feed(self, rows: Rows, tokens: Tensor) -> None:
        """Takes the tokens, int64 [T], that this step feeds; before its logits are read."""
        self._forget()
        self._state.feed(rows, tokens)

    def draw_entries(self, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> DrawEntries | None:
        """What a graph is told to draw for a SAMPLE; None where it can't: no kernel takes it, or its logits are adjusted."""
        return None if self._fused is None else self._fused.draw_entries(probe, row, position)

    @torch.no_grad()
    def read(
        self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any], drawn: Drawn | None = None
    ) -> Pending:
        """What `probe` asks of logits [U, V] (floating point; not modified).

        row: [P], the row of logits of every entry. position: [P], where its token was fed: the token drawn comes one
        later, which keys the draw. drawn: what a graph found in these logits. Raises ValueError for logits
        of another shape.
        """
        if logits.ndim != 2 or logits.shape[1] != self._vocab_size:
            raise ValueError(f"logits must be of shape [rows, {self._vocab_size}], not {list(logits.shape)}")
        if drawn is not None:
            assert self._fused is not None
            columns = self._fused.read_drawn(probe, position, drawn)
        else:
            columns = self._reads(logits, probe).read(logits, probe, row, position)
        if probe.kind is Kind.SAMPLE and drawn is None:
            self.last[upload_index(probe.slot, self._device)] = columns["token"].long()
        return Pending(columns, self._state.fields["processors"][probe.slot], self.processors.failures)

    def _reads(self, logits: Tensor, probe: Probe) -> FusedReads | NativeReads | TorchReads:
        """Who reads this."""
        if self._fused is not None:
            return self._fused if self._fused.takes(probe) else self._torch
        return self._native if self._native.takes(logits) else self._torch

    def end_step(self) -> None:
        """All probes of the step are read."""
        self._forget()
        self.processors.end_step()

    def _forget(self) -> None:
        self._torch.forget()
        if self._fused is not None:
            self._fused.forget()

"""The logits of a probe in parts that fit the cache, and what all read-outs ask of a part.

Nothing that is read depends on how entries are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.distribution import Distribution, Scale
from pagefork.kernels.filters import GREEDY
from pagefork.kernels.scratch import Scratch, chunks, widened
from pagefork.kernels.top_logprobs import token_rank
from pagefork.kernels.upload import upload
from pagefork.scheduler.plan import Bools, Ints

from .slot_state import SlotState


class Part(NamedTuple):
    """Some entries of a probe: a slice that fits the cache."""

    fields: NDArray[Any]  # the parameters of their slots [p]
    logits: Tensor  # as the model gave them, fp32 [p, W]
    adjusted: Tensor  # after bans, bias and penalties; `logits` itself where none applies


class Parts:
    """Cuts the entries of a probe into parts. They work in one memory: the next part overwrites the last."""

    def __init__(self, state: SlotState, vocab_size: int, device: torch.device) -> None:
        self.state, self.scratch, self.device = state, Scratch(), device
        self._vocab_size = vocab_size

    def cut(
        self, logits: Tensor, slot: Ints, index: Tensor, position: NDArray[Any], adjusting: Bools | None = None
    ) -> Iterator[tuple[slice, Part]]:
        """Entries [P] of logits [U, V], as in Sampler.read. Only rows marked `adjusting` (None: all) need `adjusted`."""
        for cut in chunks(len(slot), self._vocab_size, self.device):
            model = self.rows(logits, index[cut])
            adjusted = model
            wanted = None if adjusting is None else adjusting[cut]
            if wanted is None or wanted.any():
                adjusted = self.state.adjust(model, slot[cut], position[cut], self.scratch, wanted)
            yield cut, Part(self.state.fields[slot[cut]], model, adjusted)

    def rows(self, logits: Tensor, index: Tensor) -> Tensor:
        """Rows of logits as the kernels take them, fp32 [p, W]."""
        return widened(self._picked(logits, index), self.scratch)

    def _picked(self, logits: Tensor, index: Tensor) -> Tensor:
        if len(index) and index.device.type == "cpu":
            first, last = int(index[0]), int(index[-1])
            if last - first + 1 == len(index) and torch.equal(index, torch.arange(first, last + 1)):
                return logits[first : last + 1]
        out = self.scratch.take("gathered", (len(index), logits.shape[1]), logits.dtype, logits.device)
        return torch.index_select(logits, 0, index, out=out)

    def distributions(self, part: Part, shaped: Bools) -> tuple[Scale, Distribution]:
        """The model's distribution; the processed one where `shaped`, elsewhere only its best token means anything."""
        model = Distribution(part.logits, None, self.scratch)
        scale = model.scale()
        fields = part.fields
        heat = np.where(shaped & (fields["temperature"] >= GREEDY), fields["temperature"], np.float32(1))
        plain = bool((heat == 1).all())
        same = plain and part.adjusted is part.logits
        dist = model if same else Distribution(part.adjusted, None if plain else self.tensor(heat), self.scratch)
        if shaped.any():
            limits = (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
            dist.restrict(*(self.tensor(np.where(shaped, fields[name], off)) for name, off in limits))
        return scale, dist

    def log_probs(self, part: Part, model: Scale, processed: Scale, ids: Tensor) -> Tensor:
        """Log-probs fp32 [p, n] of ids [p, n], of the distribution that each row reports."""
        own = model.log_probs(part.logits.gather(-1, ids))
        if not part.fields["processed"].any():
            return own
        wanted = self.tensor(part.fields["processed"])[:, None]
        return torch.where(wanted, processed.log_probs(part.adjusted.gather(-1, ids)), own)

    def ranks(self, part: Part, token: Tensor) -> Tensor:
        """Ranks int64 [p] of tokens [p], in the order that each row reports."""
        own = token_rank(part.logits, token, self.scratch)
        if part.adjusted is part.logits or not part.fields["processed"].any():
            return own
        return torch.where(self.tensor(part.fields["processed"]), token_rank(part.adjusted, token, self.scratch), own)

    def ordered(self, part: Part, processed: Scale) -> Tensor:
        """Values fp32 [p, W] that order the tokens by the log-probs that each row reports."""
        if not part.fields["processed"].any():
            return part.logits
        return torch.where(self.tensor(part.fields["processed"])[:, None], kept(part, processed), part.logits)

    def tensor(self, values: NDArray[Any]) -> Tensor:
        return upload(values, self.device)


def kept(part: Part, processed: Scale) -> Tensor:
    """The adjusted logits fp32 [p, W] of the tokens that the filters keep, -inf of the others."""
    return part.adjusted.masked_fill(part.adjusted < processed.floor[:, None], -torch.inf)


def joined(scales: list[Scale]) -> Scale:
    """The scales of parts as one."""
    return Scale(*map(torch.cat, zip(*scales, strict=True)))

"""MERGE: the best pairs of a live sequence and its next token, over all sequences of a search."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.beam_merge import Merge, Merged
from pagefork.kernels.distribution import Distribution, Scale
from pagefork.kernels.scratch import Scratch, chunks
from pagefork.kernels.top_logprobs import token_rank
from pagefork.scheduler.plan import Probe

from .logit_parts import Parts, joined
from .pending import Columns


def read_merge(parts: Parts, logits: Tensor, probe: Probe, index: Tensor, position: NDArray[Any]) -> Columns:
    """What `probe` asks of logits [U, V], as in Sampler.read.

    Bans, bias, penalties and processors apply to log-probs, as in the beam search of transformers; to logits where the probe
    is `processed`. Where none does, the log-probs of the best logits alone are computed.
    """
    assert probe.groups is not None and probe.bias is not None
    merge = Merge(probe.groups.tolist(), len(probe.slot), probe.n, parts.device)
    bias, scales = parts.tensor(probe.bias), []
    for cut, part in parts.cut(logits, probe.slot, index, position, np.zeros(len(probe.slot), np.bool_)):
        scale = Distribution(part.logits, None, parts.scratch).scale()
        scales.append(scale)
        slot = probe.slot[cut]
        if probe.processed and parts.state.adjusts(slot, position[cut]):
            adjusted = parts.state.adjust(part.logits, slot, position[cut], parts.scratch)
            merge.add(adjusted, bias[cut], Distribution(adjusted, None, parts.scratch).scale())
        elif parts.state.adjusts(slot, position[cut]):
            log_probs = _log_softmax(part.logits, scale, parts.scratch)
            merge.add(parts.state.adjust(log_probs, slot, position[cut], parts.scratch), bias[cut])
        else:
            merge.add(part.logits, bias[cut], scale)
    model, merged = joined(scales), merge.result()
    emptied = parts.tensor(parts.state.failed(probe.slot)) & ~model.bad
    return {
        "bad": model.bad | emptied,
        "top_id": merged.token.int(),
        "top_logp": _reported(parts, logits, probe, index, model, merged),
        "parent": merged.parent.int(),
        "score": merged.score,
        "emptied": emptied,
        **_ranks(parts, logits, probe, index, merged),
    }


def _log_softmax(logits: Tensor, scale: Scale, scratch: Scratch) -> Tensor:
    """All log-probs fp32 [p, W], the same bits as those of `scale`. Uses the buffers "weight" and "exact"."""
    depth = torch.sub(logits, scale.top[:, None], out=scratch.like("weight", logits))
    exact = scratch.like("exact", logits, torch.float64).copy_(depth).add_(scale.log_scale[:, None])
    return depth.copy_(exact)


def _reported(parts: Parts, logits: Tensor, probe: Probe, index: Tensor, model: Scale, merged: Merged) -> Tensor:
    """The log-probs fp32 [G, n] that the specs report."""
    parent, token = merged.parent.view(-1).clamp(min=0), merged.token.view(-1).clamp(min=0)
    own = model.pick(parent).log_probs(logits[index[parent], token].float()[:, None]).view_as(merged.score)
    processed = parts.tensor(parts.state.fields["processed"][probe.slot])[parent].view_as(merged.parent)
    return torch.where(processed | (merged.parent < 0), merged.logprob, own)


def _ranks(parts: Parts, logits: Tensor, probe: Probe, index: Tensor, merged: Merged) -> Columns:
    """Ranks [G, n] among the model's log-probs; 0 where the spec did not ask, no column where nothing is asked for."""
    wanted = parts.tensor(parts.state.fields["rank"][probe.slot])
    asked = (merged.parent >= 0) & wanted[merged.parent.clamp(min=0)]
    if not bool(asked.any()):
        return {}
    ranks = torch.zeros_like(merged.token)
    row, token = index[merged.parent[asked]], merged.token[asked]
    found = [
        token_rank(parts.rows(logits, row[cut]), token[cut], parts.scratch)
        for cut in chunks(len(row), logits.shape[1], parts.device)
    ]
    ranks[asked] = torch.cat(found)
    return {"top_rank": ranks.int()}

"""MERGE by the fused kernels: the best pairs of a live sequence and its next token, over all sequences of a search."""

from __future__ import annotations

import torch
from torch import Tensor

from pagefork.kernels.distribution import Scale
from pagefork.kernels.group_stats import GroupStats
from pagefork.kernels.merge_rows import Merged, merge_rows
from pagefork.kernels.token_rank import token_ranks
from pagefork.kernels.upload import upload
from pagefork.scheduler.plan import Bools, Probe

from .fused_pass import Given, Passes
from .pending import Columns


def merge_columns(passes: Passes, given: Given, model: Scale, probe: Probe) -> Columns:
    """What a MERGE finds, as `read_merge` does. model: the scale of the model's distributions [P]."""
    assert probe.groups is not None and probe.bias is not None
    plain = given.table is None  # nothing tells processed log-probs from the model's
    merged = merge_rows(
        *given,
        upload(probe.bias, passes.device),
        probe.groups.tolist(),
        probe.n,
        processed=probe.processed,
        scale=model if plain or not probe.processed else None,
    )
    fields = passes.state.fields[probe.slot]
    columns = {
        "bad": model.bad,
        "top_id": merged.token.int(),
        "top_logp": merged.logprob if plain else _reported(passes, given, model, merged, fields["processed"]),
        "parent": merged.parent.int(),
        "score": merged.score,
        "emptied": torch.zeros_like(model.bad),
    }
    if fields["rank"].any():
        columns["top_rank"] = _ranks(given, merged, upload(fields["rank"], passes.device))
    return columns


def _reported(passes: Passes, given: Given, model: Scale, merged: Merged, reports: Bools) -> Tensor:
    """The log-probs fp32 [G, n] that the specs report; reports: entries [P] whose spec reports processed ones."""
    parent, token = merged.parent.view(-1).clamp(min=0), merged.token.view(-1).clamp(min=0)
    row = given.entries[:, 0][parent]
    own = model.pick(parent).log_probs(given.logits[row, token].float()[:, None]).view_as(merged.score)
    processed = upload(reports, passes.device)[merged.parent.clamp(min=0)]
    return torch.where(processed | (merged.parent < 0), merged.logprob, own)


def _ranks(given: Given, merged: Merged, wanted: Tensor) -> Tensor:
    """Ranks int32 [G, n] among the model's log-probs; 0 where the spec did not ask. wanted: bool [P]."""
    parent = merged.parent.view(-1).clamp(min=0)
    stats = GroupStats(given.stats.top[:1, parent], given.stats.mass[:1, parent])
    ranks = token_ranks(given.logits, given.entries[parent], stats, None, merged.token.view(-1, 1))
    return ranks[:, 0].masked_fill_(~wanted[parent], 0).int().view_as(merged.token)

"""Values and ranks of given tokens are those of whole rows, adjusted or not."""

from __future__ import annotations

import pytest
import torch
from support.group_rows import ADJUSTED_FLAGS, entries, marked_table, rows

from pagefork.kernels import token_rank as module
from pagefork.kernels.adjusted import adjusted_rows
from pagefork.kernels.adjusted_stats import adjust_stats
from pagefork.kernels.group_stats import group_stats
from pagefork.kernels.token_rank import token_ranks, token_values
from pagefork.kernels.token_table import TokenTable


@pytest.mark.parametrize(
    ("vocab", "dtype", "many"),
    [(1, torch.float32, 1), (2, torch.float16, 3), (65, torch.bfloat16, 3), (999, torch.float32, 2), (4097, torch.bfloat16, 1)],
)
def test_values_and_ranks_are_those_of_whole_rows(vocab: int, dtype: torch.dtype, many: int, device: torch.device) -> None:
    """Of raw and adjusted entries side by side, and of what is no token."""
    logits = rows(vocab, dtype, device)
    given, table = entries([0, 1, 1, 3, 4, 6, 0], ADJUSTED_FLAGS, device), marked_table(7, vocab, device)
    stats = group_stats(logits, given, True)
    adjust_stats(stats, logits, given, table)
    token = torch.randint(0, vocab, (7, many), generator=torch.Generator().manual_seed(many))
    token[3, many // 2] = -1
    own = torch.tensor([True, True, True, True, True, False, True])
    raw = logits.float()[given[:, 0].long()].cpu()
    adjusted = adjusted_rows(raw, given.cpu(), TokenTable(*(field.cpu() for field in table)))
    for asked, x in ((None, raw), (own, torch.where(own[:, None], adjusted, raw))):
        mask = None if asked is None else asked.to(device)
        value = x.gather(-1, token.clamp(min=0)).masked_fill(token < 0, -torch.inf)
        rank = 1 + (x[:, None] > value[..., None]).sum(-1)
        assert torch.equal(token_values(logits, given, table, token.to(device), mask).cpu(), value)
        found = token_ranks(logits, given, stats, table, token.to(device), mask).cpu()
        assert torch.equal(found, rank.masked_fill(token < 0, 0))


def test_no_cut_of_a_row_changes_a_rank(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = rows(2 * 64 * module.TILE + 70, torch.bfloat16, device)
    given = entries(range(7), [0] * 7, device)
    token = torch.tensor([[7, 4000], [4096, 70], [1, 2], [0, 5], [3000, 90], [8, 9], [4165, 0]], device=device)
    x = logits.float()
    expected = 1 + (x[:, None] > x.gather(-1, token)[..., None]).sum(-1)
    stats = group_stats(logits, given, False)
    for programs in (1, 28, 1 << 20):
        monkeypatch.setattr(module, "_PROGRAMS", programs)
        assert torch.equal(token_ranks(logits, given, stats, None, token), expected)


def test_what_makes_no_sense_is_refused(device: torch.device) -> None:
    logits, given = torch.zeros(2, 5, device=device), entries([0, 1], [0, 0], device)
    for token in (torch.zeros(2, device=device), torch.zeros(2, 1, device=device), torch.zeros(1, 1, device=device).long()):
        with pytest.raises(ValueError, match=r"token must be contiguous integers \[2, m\]"):
            token_values(logits, given, None, token)

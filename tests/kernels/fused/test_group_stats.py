"""Records of groups are those of a plain computation, whatever the dtype, the stride and the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagefork.kernels import group_stats as module
from pagefork.kernels.entries import ENTRY, Entry
from pagefork.kernels.group_stats import UNIT, group_stats


def entries(rows: list[int], flags: list[int], temperature: list[float], device: torch.device) -> torch.Tensor:
    records = np.zeros(len(rows), ENTRY)
    records["row"], records["flags"], records["temperature"] = rows, flags, temperature
    return torch.from_numpy(records.view(np.int32).reshape(len(rows), -1)).to(device)


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 999, 4097])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tops_are_exact_and_masses_near_float64(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (6 * torch.randn(5, vocab + 3, generator=generator)).to(device, dtype)[:, 1 : vocab + 1]
    logits[2, : vocab // 2] = -torch.inf
    rows, temperature = [0, 1, 2, 3, 4, 0, 2], [1.0, 0.5, 2.0, 1.0, 1.0, 0.3, 1.5]
    given = entries(rows, [int(Entry.OWN)] * len(rows), temperature, device)
    found = group_stats(logits, given, True)
    padded = torch.nn.functional.pad(logits.double(), (0, -vocab % 64), value=-torch.inf)[rows].view(len(rows), -1, 64)
    top = padded.amax(-1)
    for which, heat in enumerate((torch.ones(len(rows), device=device), torch.tensor(temperature, device=device))):
        assert torch.equal(found.top[which].double(), top)
        depth = padded - top.masked_fill(top == -torch.inf, 0)[..., None]
        mass = (depth / heat.double()[:, None, None]).exp().sum(-1)
        assert (found.mass[which] / UNIT - mass).abs().max() < 2e-5


def test_no_tile_and_no_batch_changes_a_record(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(33, 4097).to(device, torch.bfloat16)
    flags, temperature = [int(Entry.OWN)] * 33, [0.5 + row / 10 for row in range(33)]
    together = group_stats(logits, entries(list(range(33)), flags, temperature, device), True)
    for tile in (16, 32):
        monkeypatch.setattr(module, "TILE", tile)
        alone = [group_stats(logits, entries([row], [4], [temperature[row]], device), True) for row in range(33)]
        assert all(
            torch.equal(torch.cat(parts, 1), whole) for parts, whole in zip(zip(*alone, strict=True), together, strict=True)
        )


def test_nan_makes_a_top_infinite_and_only_empties_an_entry(device: torch.device) -> None:
    logits = torch.zeros(2, 130, device=device)
    logits[0, 129] = torch.nan
    found = group_stats(logits, entries([0, 1], [0, Entry.OWN | Entry.ONLY], [1.0, 1.0], device), True)
    assert found.top[0].tolist() == [[0.0, 0.0, torch.inf], [0.0, 0.0, 0.0]]
    assert found.top[1, 1].tolist() == [-torch.inf] * 3 and found.mass[1, 1].tolist() == [0] * 3
    assert found.mass[0, 1].tolist() == [64 * 2**23, 64 * 2**23, 2 * 2**23]

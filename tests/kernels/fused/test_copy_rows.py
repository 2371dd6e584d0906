"""Every destination becomes what its source was, whoever else is copied, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagefork.kernels.copy_rows import MOST, copy_rows
from pagefork.kernels.kv_cache import copy_blocks


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random bits, NaN among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    numbers = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return numbers.to(device).view(dtype).squeeze(-1) if dtype.itemsize > 1 else (numbers.squeeze(-1) % 2).to(device, dtype)


def same(x: Tensor, y: Tensor) -> bool:
    """Bit by bit."""
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3), (40, 4), (40, 8, 16), (40, 2052)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_destinations_become_sources_even_where_they_overlap(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Swaps, chains, rows to themselves, one source for many."""
    x = bytes_of(shape, dtype, device)
    src = torch.tensor([1, 0, 5, 6, 7, 9, 9, 9, 20, 39], device=device)
    dst = torch.tensor([0, 1, 6, 7, 8, 2, 3, 9, 39, 38], device=device)
    for kind in (torch.int64, torch.int32):
        expected = x.clone()
        expected[dst] = x[src]
        copy_rows(x, src.to(kind), dst.to(kind))
        assert same(x, expected)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 17, 100, 300, MOST + 1])
def test_any_number_of_rows_is_permuted(count: int, device: torch.device) -> None:
    x = bytes_of((max(count, 3), 12), torch.float32, device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(count)).to(device)[:count]
    expected = x.clone()
    expected[order.flip(0)] = x[order]
    copy_rows(x, order, order.flip(0))
    assert same(x, expected)


@pytest.mark.parametrize("columns", [slice(0, 5), slice(0, 8), slice(0, 64), slice(1, 5), slice(2, 10)], ids=str)
def test_the_columns_in_use_are_copied_and_the_others_stay(columns: slice, device: torch.device) -> None:
    x = bytes_of((9, 64), torch.bfloat16, device)
    expected = x.clone()
    expected[[3, 4], columns] = x[[4, 8], columns]
    copy_rows(x[:, columns], torch.tensor([4, 8], device=device), torch.tensor([3, 4], device=device))
    assert same(x, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_blocks_are_copied_in_every_layer(dtype: torch.dtype, device: torch.device) -> None:
    cache = bytes_of((3, 12, 2, 8, 16), dtype, device)
    src, dst = torch.tensor([1, 4, 1], device=device), torch.tensor([2, 11, 3], device=device)
    expected = cache.clone()
    expected[:, dst] = cache[:, src]
    copy_blocks(cache, src, dst)
    assert same(cache, expected)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, one = torch.zeros(4, 6, 5, device=device), torch.tensor([1], device=device)
    for args in ((x, one, torch.tensor([1, 2], device=device)), (x, one, one.int()), (x, one.float(), one.float())):
        with pytest.raises(ValueError, match="one to one"):
            copy_rows(*args)
    with pytest.raises(ValueError, match="rows are along dimension 0, or 1 after layers"):
        copy_rows(x, one, one, dim=2)
    with pytest.raises(ValueError, match="must lie together"):
        copy_rows(x.transpose(1, 2), one, one)

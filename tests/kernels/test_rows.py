"""What a layer does row by row gives a row the same bits in any number of rows, on one thread and on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pagefork.kernels._rows import even_slices
from pagefork.kernels.rms_norm import rms_norm
from pagefork.kernels.rope import rope, rope_tables
from pagefork.kernels.silu_mul import silu_mul

ROWS = 700


def norm(x: Tensor) -> Tensor:
    return rms_norm(x, torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype), 1e-6)


def norm_of_a_sum(x: Tensor) -> Tensor:
    residual = x.flip(1).contiguous()
    y = rms_norm(x, torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype), 1e-6, residual)
    return torch.cat((y, residual), 1)


def norm_of_heads(x: Tensor) -> Tensor:
    heads = x.view(len(x), 3, -1)[:, :2]
    return rms_norm(heads, torch.ones(2, heads.shape[2], dtype=x.dtype), 1e-6).flatten(1)


def rotation(x: Tensor) -> Tensor:
    """The first column says where a row is."""
    n = x.shape[1] // 3
    tables = rope_tables((x[:, 0].abs() * 999).long(), 1e4 ** -torch.linspace(0, 1, n // 2), 1.1, x.dtype)
    return rope(x.view(len(x), 3, n), *tables).flatten(1)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [84, 288])
@pytest.mark.parametrize("function", [norm, norm_of_a_sum, norm_of_heads, rotation, silu_mul])
def test_the_bits_of_a_row_do_not_depend_on_how_many_rows_there_are(
    function: Callable[[Tensor], Tensor], columns: int, dtype: torch.dtype, threads: int
) -> None:
    x = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    whole = function(x)
    alone = torch.cat([function(x[row : row + 1]) for row in range(ROWS)])
    assert torch.equal(whole, alone)
    for rows in (3, 4, 113, 114, 227, 341, 467, 699):
        assert torch.equal(function(x[:rows]), whole[:rows]), rows


def test_slices_cover_all_rows_and_threads_share_each_by_whole_rows(threads: int) -> None:
    for columns in (1, 96, 1536, 40000):
        for rows in (0, 1, 2, 3, 64, 65, 700, 2047):
            slices = even_slices(torch.empty(rows, 2 * columns)[:, :columns])
            assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
            for part in slices:
                count = part.stop - part.start
                assert count == 1 or count % min(threads, -(-count * columns // 32768)) == 0

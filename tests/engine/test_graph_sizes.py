"""Which sizes graphs come in, and what they have room for."""

from __future__ import annotations

import pytest

from pagefork.graph import MOST_ROWS, buckets, most_parts
from pagefork.kernels.attention_tasks import SPLIT


@pytest.mark.parametrize("most", [1, 3, 4, 20, 256, 300, 512, 5000])
def test_every_number_of_rows_has_a_bucket_that_is_not_much_larger(most: int) -> None:
    sizes = buckets(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == min(most, MOST_ROWS)
    for rows in range(1, sizes[-1] + 1):
        size = next(size for size in sizes if size >= rows)
        assert size < 2 * rows and (rows < 16 or size < 1.5 * rows)


def test_there_is_room_for_what_single_tokens_can_need_but_not_for_a_cache_that_many_read_whole() -> None:
    assert most_parts(8, 1 << 20, 2 * SPLIT) == 16
    assert most_parts(8, 100 * SPLIT, 150 * SPLIT) == 416

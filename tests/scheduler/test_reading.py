"""Reads of a generation that came in several steps."""

from __future__ import annotations

import numpy as np

from pagefork.scheduler.plan import Reads, ints
from pagefork.scheduler.reading import Merged, join


def test_what_only_a_neighbour_in_one_of_the_steps_asked_for_is_left_out() -> None:
    ids = ints([[3, 1], [2, 0]])
    alone, beside = Reads(np.zeros(2, bool), top_id=ids), Reads(np.zeros(1, bool), top_id=ids[:1], top_rank=ids[:1])
    for parts in ((alone, beside), (beside, alone)):
        whole = join(parts, [len(part.bad) for part in parts])
        assert whole.top_rank is None
        assert whole.top_id.tolist() == [row for part in parts for row in part.top_id.tolist()]


def test_ranks_of_merged_pairs_are_kept_where_every_step_has_them() -> None:
    def merged(rank: list[int] | None) -> Merged:
        return Merged([0, 1], [5, 6], [-1.0, -2.0], [-1.0, -2.0], rank)

    assert join((merged([1, 2]), merged([3, 4])), [2, 2]).rank == [1, 2, 3, 4]
    for parts in ((merged([1, 2]), merged(None)), (merged(None), merged([1, 2]))):
        whole = join(parts, [2, 2])
        assert whole.rank is None and whole.parent == [0, 1, 2, 3]

"""Blocks are handed out once, come back when nobody holds them, and cached ones go in the order of their release."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagefork.scheduler.block_pool import BlockPool
from pagefork.scheduler.errors import BlockAccountingError
from pagefork.scheduler.plan import ints
from pagefork.scheduler.prefix_cache import PrefixCache


def test_the_padding_sink_is_never_handed_out() -> None:
    pool = BlockPool(8)
    assert sorted(pool.allocate(7).tolist()) == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(BlockAccountingError, match="1 blocks asked of 0"):
        pool.allocate(1)


def test_blank_blocks_go_before_cached_ones_and_tails_before_heads() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 1)
    table = pool.allocate(3)
    for i, block in enumerate(table.tolist()):
        cache.publish(i, bytes([i]), block)
    pool.release(table)
    assert pool.free == 7 and pool.cached == 3
    assert not set(pool.allocate(4).tolist()) & set(table.tolist())
    assert pool.allocate(2).tolist() == table[::-1][:2].tolist()


def test_the_least_recently_released_is_evicted_first() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, 1)
    first, second, third = pool.allocate(3).tolist()
    for i, block in enumerate((first, second, third)):
        cache.publish(0, bytes([i]), block)
    for block in (second, third, first):
        pool.release(ints([block]))
    pool.retain(ints([second]))
    pool.release(ints([second]))
    assert [pool.allocate(1)[0] for _ in range(3)] == [third, first, second]


def test_a_held_block_survives_any_allocation() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, 1)
    block = int(pool.allocate(1)[0])
    cache.publish(cache.root(), ints([7]).tobytes(), block)
    pool.release(ints([block]))
    assert cache.take(cache.root(), ints([7]), 1).tolist() == [block]
    assert block not in pool.allocate(2)
    assert pool.free == 0


def test_evicted_content_is_not_found_and_its_children_neither() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, 2)
    root, tokens = cache.root(), ints([1, 2, 3, 4])
    parent, child = pool.allocate(2).tolist()
    cache.publish(root, tokens[:2].tobytes(), parent)
    cache.publish(int(pool.uid[parent]), tokens[2:].tobytes(), child)
    pool.release(ints([parent]))  # a head that goes before its tail
    fresh = pool.allocate(2)
    assert parent in fresh
    assert len(cache.take(root, tokens, 2)) == 0
    assert pool.uid[child]  # still published, under a parent that nobody can name any more
    again = cache.publish(root, tokens[:2].tobytes(), parent)
    assert cache.take(root, tokens, 2).tolist() == [again]


def test_equal_content_is_published_once() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, 1)
    first, second = pool.allocate(2).tolist()
    assert cache.publish(cache.root(), b"abcd", first) == first
    assert cache.publish(cache.root(), b"abcd", second) == first
    assert pool.uid[second] == 0


def test_unpublished_content_is_gone_whoever_holds_it() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, 1)
    block = int(pool.allocate(1)[0])
    cache.publish(cache.root(), ints([5]).tobytes(), block)
    pool.unpublish(block)
    assert len(cache.take(cache.root(), ints([5]), 1)) == 0
    pool.release(ints([block]))
    pool.check(ints())


def test_wrong_references_are_found() -> None:
    pool = BlockPool(4)
    block = pool.allocate(1)
    pool.check(block)
    with pytest.raises(BlockAccountingError, match="has 1 references, the tables hold 0"):
        pool.check(ints())
    pool.retain(block)
    with pytest.raises(BlockAccountingError, match="has 2 references, the tables hold 1"):
        pool.check(block)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release", "publish"]), st.integers(0, 5)), max_size=60))
def test_references_equal_those_of_a_plain_count(moves: list[tuple[str, int]]) -> None:
    pool = BlockPool(10)
    cache = PrefixCache(pool, 1)
    held: list[int] = []
    for step, (move, amount) in enumerate(moves):
        some = held[:amount]
        if move == "allocate" and amount <= pool.free:
            held += pool.allocate(amount).tolist()
        elif move == "retain":
            pool.retain(ints(some))
            held += some
        elif move == "release":
            pool.release(ints(some))
            held = held[amount:]
        elif move == "publish":
            for block in some:
                if not pool.uid[block]:
                    cache.publish(step, bytes([block]), block)
        pool.check(ints(held))
        assert pool.free == 9 - len(np.unique(held))

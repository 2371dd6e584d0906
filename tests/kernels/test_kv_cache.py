"""What is written to the cache is found where the layout says, and copies read before they write."""

from __future__ import annotations

import pytest
import torch

from pagefork.kernels.kv_cache import copy_blocks, write_kv


def test_a_token_is_written_to_its_place_and_nowhere_else() -> None:
    k_cache, v_cache = torch.zeros(6, 2, 8, 4), torch.zeros(6, 2, 4, 8)
    qkv = torch.randn(3, 6, 8)
    k, v = qkv[:, 2:4], qkv[:, 4:]
    blocks, offsets = torch.tensor([5, 1, 5]), torch.tensor([0, 3, 2])
    write_kv(k, v, k_cache, v_cache, blocks, offsets)
    for token, (block, offset) in enumerate(zip(blocks.tolist(), offsets.tolist(), strict=True)):
        assert torch.equal(k_cache[block, :, :, offset], k[token])
        assert torch.equal(v_cache[block, :, offset], v[token])
    assert k_cache.count_nonzero() == v_cache.count_nonzero() == 3 * 2 * 8


def test_every_layer_is_copied_and_sources_are_read_first() -> None:
    cache = torch.randn(3, 5, 2)
    before = cache.clone()
    copy_blocks(cache, torch.tensor([1, 2, 1]), torch.tensor([2, 4, 3]))
    assert torch.equal(cache, before[:, [0, 1, 1, 1, 2]])


def test_what_does_not_fit_is_refused() -> None:
    k_cache, v_cache, place = torch.zeros(6, 2, 8, 4), torch.zeros(6, 2, 4, 8), torch.zeros(3, dtype=torch.long)
    good = torch.zeros(3, 2, 8)
    for k, v in [(good[:2], good[:2]), (good, good[:, :1]), (good[..., :4], good[..., :4])]:
        with pytest.raises(ValueError, match="3 places"):
            write_kv(k, v, k_cache, v_cache, place, place)
    with pytest.raises(ValueError, match="do not go with"):
        write_kv(good, good, k_cache, torch.zeros(6, 2, 8, 4), place, place)
    with pytest.raises(ValueError, match="one to one"):
        copy_blocks(k_cache, place, place[:2])

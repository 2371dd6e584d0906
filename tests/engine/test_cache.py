"""The cache: its size, its copies, and what clears it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.feeding import Feeder

from pagefork.cache import KVCache, block_bytes, num_blocks_for
from pagefork.models.config import ModelConfig
from pagefork.models.registry import load_model
from pagefork.scheduler.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path)
    return load_model(path, torch.float32, CPU).config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_takes_the_bytes_that_it_says(config: ModelConfig, dtype: torch.dtype) -> None:
    cache = KVCache(config, 7, 8, dtype, CPU)
    assert cache.k.nbytes + cache.v.nbytes == 7 * block_bytes(config, 8, dtype)
    assert cache.k.shape[:2] == cache.v.shape[:2] == (config.num_hidden_layers, 7)


def test_memory_is_turned_into_whole_blocks(config: ModelConfig) -> None:
    size = block_bytes(config, 16, torch.float32)
    assert num_blocks_for(10 * size + 1, config, 16, torch.float32) == 10
    assert 2 <= num_blocks_for(None, config, 16, torch.float32) <= (4 << 30) // size


def test_a_cache_that_is_too_small_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_memory=100 is too small.*2"):
        num_blocks_for(100, config, 16, torch.float32)
    with pytest.raises(ConfigError, match="at least 2 blocks"):
        KVCache(config, 1, 16, torch.float32, CPU)


def test_copies_reach_every_layer_and_read_before_they_write(config: ModelConfig) -> None:
    cache = KVCache(config, 6, 4, torch.float32, CPU)
    cache.k.normal_(), cache.v.normal_()
    k, v = cache.k.clone(), cache.v.clone()
    cache.copy_blocks(np.array([1, 2, 5], np.int32), np.array([2, 3, 4], np.int32))
    order = [0, 1, 1, 2, 5, 5]
    assert torch.equal(cache.k, k[:, order]) and torch.equal(cache.v, v[:, order])
    cache.copy_blocks(np.empty(0, np.int32), np.empty(0, np.int32))


def test_a_forked_row_goes_on_from_the_copy_of_its_last_block(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    feeder = Feeder(load_model(tmp_path, torch.float32, CPU))
    prompt = list(range(20))
    [whole] = feeder.feed([(0, 0, [*prompt, 7, 8])])
    feeder.feed([(1, 0, prompt)])
    feeder.tables[2] = feeder.tables[1]
    feeder.tables[2, 1] = feeder.tables[3, 1]
    feeder.cache.copy_blocks(feeder.tables[1, 1:2], feeder.tables[2, 1:2])
    feeder.feed([(1, 20, [9])])
    [forked] = feeder.feed([(2, 20, [7, 8])])
    torch.testing.assert_close(forked, whole[20:], rtol=1e-4, atol=1e-4)

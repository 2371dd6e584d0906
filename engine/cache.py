"""The paged KV cache: blocks of keys and values of all layers, and of last hidden states where searches need them."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels.huge_pages import mapped
from pagefork.kernels.kv_cache import copy_blocks
from pagefork.kernels.similarity import write_states
from pagefork.kernels.upload import upload_index
from pagefork.scheduler.errors import ConfigError

if TYPE_CHECKING:
    from pagefork.models.config import ModelConfig

_CPU_MOST = 4 << 30  # bytes taken unasked on a CPU, whose memory others need as well
_CPU_SHARE = 0.5  # of the memory available there


class KVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens.

    k: [layers, blocks, kv heads, head size, block size]; v: [layers, blocks, kv heads, block size, head size], laid out
    as kernels/kv_cache.py says. hidden: the states after the last norm, of norm 1, [blocks, block size, hidden size], or
    None; every forward fills them, so that blocks that are shared, found again or copied have them. Block 0 is where
    padding tokens go; it is never handed out. A fresh block holds whatever memory held, perhaps NaN, until `begin` clears
    its keys; the rest is read only where it was written.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        hidden_states: bool = False,
    ) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ConfigError(
                f"a cache has at least 2 blocks (one takes the padding) of 1 token; given {num_blocks} of {block_size}"
            )
        layers, heads, size = config.num_hidden_layers, config.num_kv_heads, config.head_dim
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        try:
            self.k = _pages((layers, num_blocks, heads, size, block_size), dtype, device)
            self.v = _pages((layers, num_blocks, heads, block_size, size), dtype, device)
            shape = num_blocks, block_size, config.hidden_size
            self.hidden = torch.empty(shape, dtype=dtype, device=device) if hidden_states else None
        except (RuntimeError, MemoryError, OSError, OverflowError) as error:
            memory = num_blocks * block_bytes(config, block_size, dtype, hidden_states)
            raise ConfigError(
                f"a cache of {num_blocks} blocks takes {memory} bytes, more than there are: lower num_blocks or kv_cache_memory"
            ) from error

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + (0 if self.hidden is None else self.hidden.nbytes)

    def begin(self, blocks: Tensor) -> None:
        """Clears the keys of blocks (int64) that are about to be filled in part, for whole blocks of keys are read."""
        if blocks.numel():
            self.k.index_fill_(1, blocks, 0)

    def zero(self, count: int) -> None:
        """The first `count` blocks hold zeros, not what memory held."""
        self.k[:, :count].zero_()
        self.v[:, :count].zero_()

    def copy_blocks(self, src: NDArray[np.int32], dst: NDArray[np.int32]) -> None:
        """Copies whole blocks in every layer; all sources are read before a destination is written."""
        if len(src):
            read, written = upload_index(np.stack((src, dst)), self.device)
            copy_blocks(self.k, read, written)
            copy_blocks(self.v, read, written)
            if self.hidden is not None:
                copy_blocks(self.hidden[None], read, written)

    def write_hidden(self, states: Tensor, blocks: Tensor, offsets: Tensor) -> None:
        """Stores the last hidden states [T, hidden size] of a step's tokens, where their keys and values are."""
        if self.hidden is not None:
            write_states(states, self.hidden, blocks, offsets)


def _pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any contents. A CPU's is on huge pages: blocks of a sequence lie anywhere, and looking up addresses costs."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = prod(shape)
    return mapped(size * dtype.itemsize).view(dtype)[:size].view(shape)


def hidden_share(config: ModelConfig) -> float:
    """How much memory hidden states take, relative to that of keys and values."""
    return config.hidden_size / (2 * config.num_hidden_layers * config.num_kv_heads * config.head_dim)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, hidden_states: bool = False) -> int:
    """Bytes of one block: keys and values of all layers, and the hidden states."""
    layers = 2 * config.num_hidden_layers * config.num_kv_heads * config.head_dim
    return (layers + config.hidden_size * hidden_states) * block_size * dtype.itemsize


def num_blocks_for(
    memory: int | None, config: ModelConfig, block_size: int, dtype: torch.dtype, hidden_states: bool = False
) -> int:
    """How many blocks fit into `memory` bytes; None: those that a CPU's memory is asked for, see `cpu_share`.

    Raises ConfigError if not even two blocks fit.
    """
    per_block = block_bytes(config, block_size, dtype, hidden_states)
    blocks = (cpu_share() if memory is None else memory) // per_block
    if blocks < 2:
        given = "the free memory" if memory is None else f"kv_cache_memory={memory}"
        raise ConfigError(
            f"{given} is too small for the cache: a block of {block_size} tokens takes {per_block} bytes, and it needs 2"
        )
    return blocks


def cpu_share() -> int:
    """Bytes that a cache takes of a CPU's memory unasked: half of what is available, but at most 4 GiB."""
    return min(_CPU_MOST, int(_available() * _CPU_SHARE))


def _available() -> int:
    """Bytes of memory that a process can take without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return _CPU_MOST

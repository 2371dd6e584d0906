"""Philox4x32-10: random numbers that are a pure function of (key, counter), so that no batch can change them.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A round, with the high and low halves of
32 x 32 bit products:

    c0', c1', c2', c3' = hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0);   k += W
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl

ROUNDS = 10
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(key: Tensor, counter: Tensor) -> Tensor:
    """Four 32-bit words per column.

    key: int64 [2, B], counter: int64 [4, B], every entry in [0, 2^32). Returns int64 [4, B], entries in [0, 2^32).
    Raises ValueError for other shapes or types.
    """
    if not key.dtype == counter.dtype == torch.int64 or len(key) != 2 or len(counter) != 4 or key.shape[1:] != counter.shape[1:]:
        given = ", ".join(f"{words.dtype} {list(words.shape)}" for words in (key, counter))
        raise ValueError(f"key and counter must be int64 [2, B] and [4, B], not {given}")
    multiplier = key.new_tensor(_MULTIPLIER)[:, None]
    rounds = torch.arange(ROUNDS, device=key.device)[:, None, None]
    even, odd = counter[0::2], counter[1::2]
    for k in (key + rounds * key.new_tensor(_WEYL)[:, None]).unbind():
        product = (even * multiplier).flip(0)  # wraps into the sign bit, which the masks undo
        odd, even = product & _LOW, (product >> 32).bitwise_xor_(odd).bitwise_xor_(k).bitwise_and_(_LOW)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seed: Tensor, stream: Tensor, position: Tensor) -> Tensor:
    """One number in [0, 1) per row, float64 [B] with 53 random bits.

    seed, stream, position: int64 [B]. Key = seed, counter = (position, stream low, stream high, 0).
    """
    seed, stream, position = (value.to(torch.int64) for value in (seed, stream, position))
    key = torch.stack((seed & _LOW, (seed >> 32) & _LOW))
    counter = torch.stack((position & _LOW, stream & _LOW, (stream >> 32) & _LOW, torch.zeros_like(stream)))
    high, low, _, _ = philox4x32(key, counter)
    bits: Tensor = (high << 21) | (low >> 11)
    return bits.double().mul_(2.0**-53)


@jit
def uniform_bits(seed: tl.tensor, stream: tl.tensor, position: tl.tensor) -> tl.tensor:
    """uint64 scalar: the 53 bits of `uniform`, times 2^11. seed, stream: int64; position: int32."""
    zero = position * 0
    words = tl.philox(seed, position, stream.to(tl.int32), (stream >> 32).to(tl.int32), zero)
    return ((words[0].to(tl.uint64) << 32) | words[1].to(tl.uint64)) & 0xFFFFFFFFFFFFF800


@jit
def aimed(bits: tl.tensor, mass: tl.tensor) -> tl.tensor:
    """int64 scalar: floor(uniform * mass), exactly. bits: of `uniform_bits`; mass: int64, at least 0."""
    return tl.umulhi(bits, mass.to(tl.uint64)).to(tl.int64)

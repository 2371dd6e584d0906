"""The random numbers are those of the published Philox4x32-10, and a pure function of their key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import logits as book

from pagefork.kernels.philox import philox4x32, uniform

# Known answers distributed with Random123 (kat_vectors, philox4x32 10): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])[:, None]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert torch.equal(philox4x32(words(key), words(counter)), words(result))


def test_every_column_is_its_own_call() -> None:
    rng = np.random.default_rng(0)
    key, counter = rng.integers(0, 2**32, (2, 50)), rng.integers(0, 2**32, (4, 50))
    found = philox4x32(torch.from_numpy(key), torch.from_numpy(counter))
    for column in range(50):
        assert found[:, column].tolist() == book.philox4x32(counter[:, column].tolist(), key[:, column].tolist())


def test_uniform_uses_every_bit_of_seed_stream_and_position() -> None:
    rng = np.random.default_rng(1)
    base = rng.integers(-(2**63), 2**63, (2, 64))
    rows = [(int(seed), int(stream), int(rng.integers(0, 2**31))) for seed, stream in base.T]
    rows += [(1 << bit, 0, 0) if bit < 63 else (-(2**63), 0, 0) for bit in range(64)]
    rows += [(0, 1 << bit, 0) if bit < 63 else (0, -(2**63), 0) for bit in range(64)]
    rows += [(0, 0, 1 << bit) for bit in range(31)]
    found = uniform(*torch.tensor(rows).T)
    assert found.tolist() == [book.uniform(*row) for row in rows]
    assert len(set(found.tolist())) == len(rows)
    assert found.min() >= 0 and found.max() < 1


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"int64 \[2, B\] and \[4, B\]"):
        philox4x32(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="int64"):
        philox4x32(torch.zeros(2, 3), torch.zeros(4, 3))

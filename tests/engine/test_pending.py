"""What leaves the device in one piece comes apart as it was."""

from __future__ import annotations

import numpy as np
import torch

from pagefork.pending import packed, unpacked


def test_tensors_of_all_kinds_keep_their_values_types_and_shapes() -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(10, dtype=torch.int32).view(2, 5),
        torch.tensor(1.5),
        torch.empty(0, 4),
        torch.randn(3, 7)[:, ::2],
        torch.tensor([-torch.inf, torch.nan, -0.0]),
        torch.arange(3),
    ]
    found = unpacked(packed(tensors, torch.device("cpu")).numpy(), tensors)
    for array, tensor in zip(found, tensors, strict=True):
        expected = tensor.numpy()
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)

"""Rotation as in transformers' Llama."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pagefork.kernels.rope import rope, rope_tables

FREQUENCIES = 100.0 ** (-torch.arange(0, 16, 2) / 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_equals_transformers(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 5, 900, 3, 100_000])
    x = torch.randn(6, 7, 16).to(dtype)
    found = rope(x[:, 2:], *rope_tables(positions, FREQUENCIES, scale, dtype))
    angles = (positions[:, None].float() * FREQUENCIES).repeat(1, 2)
    tables = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
    expected, _ = apply_rotary_pos_emb(x[:, 2:], x[:, 2:], *tables, unsqueeze_dim=1)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found.is_contiguous()


def test_products_of_rotated_vectors_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)

    def product(at: int, to: int) -> float:
        first, second = (rope(x, *rope_tables(torch.tensor([p]), FREQUENCIES, 1.0, torch.float64)) for x, p in ((q, at), (k, to)))
        return float((first * second).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    cos, sin = rope_tables(torch.arange(3), FREQUENCIES, 1.0, torch.float32)
    for x in (torch.zeros(2, 1, 16), torch.zeros(3, 1, 8), torch.zeros(3, 16)):
        with pytest.raises(ValueError, match="tables"):
            rope(x, cos, sin)
    with pytest.raises(ValueError, match="vectors"):
        rope_tables(torch.zeros(1, 3), FREQUENCIES, 1.0, torch.float32)

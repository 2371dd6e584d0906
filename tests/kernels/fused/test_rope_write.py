"""One launch normalises and turns queries and keys and writes keys and values, as the functions one by one."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pagefork.kernels.kv_cache import write_kv
from pagefork.kernels.rms_norm import reference as norm
from pagefork.kernels.rope import rope, rope_tables
from pagefork.kernels.rope_write import rope_write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, KV, BLOCKS, SIZE = 3, 2, 7, 16


class Case(NamedTuple):
    """`count` tokens at random places; of caches that are full of NaN."""

    qkv: Tensor
    weight: Tensor
    cos: Tensor
    sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    blocks: Tensor
    offsets: Tensor

    def write(self, norm: bool, rows: Tensor | slice = slice(None)) -> Tensor:
        """The queries of these rows."""
        places = self.blocks[rows], self.offsets[rows]
        weight = self.weight if norm else None
        return rope_write(self.qkv[rows], weight, 1e-6, self.cos[rows], self.sin[rows], self.k_cache, self.v_cache, *places)


def make(width: int, dtype: torch.dtype, device: torch.device, count: int = 37, index: torch.dtype = torch.int32) -> Case:
    generator = torch.Generator().manual_seed(width)
    positions = torch.randint(0, 40_000, (count,), generator=generator)
    tables = rope_tables(positions, 1e4 ** -torch.linspace(0, 1, width // 2), 1.1, dtype)
    place = torch.randperm((BLOCKS - 1) * SIZE, generator=generator)[:count] + SIZE
    given = (
        torch.randn(count, HEADS + 2 * KV, width, generator=generator).to(dtype),
        torch.randn(HEADS + KV, width, generator=generator).to(dtype),
        *tables,
        torch.full((BLOCKS, KV, width, SIZE), torch.nan, dtype=dtype),
        torch.full((BLOCKS, KV, SIZE, width), torch.nan, dtype=dtype),
        (place // SIZE).to(index),
        (place % SIZE).to(index),
    )
    return Case(*(x.to(device) for x in given))


def stored(case: Case) -> tuple[Tensor, Tensor]:
    """Keys and values [T, KV, D] at the places of the tokens; what else is stored must be untouched."""
    blocks, offsets = case.blocks.long(), case.offsets.long()
    k, v = case.k_cache.permute(0, 3, 1, 2), case.v_cache.transpose(1, 2)
    found = k[blocks, offsets], v[blocks, offsets]
    for cache in (k, v):
        rest = cache.clone()
        rest[blocks, offsets] = torch.nan
        assert rest.isnan().all()
    return found


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("width", "dtype"), [(64, dtype) for dtype in DTYPES] + [(48, torch.bfloat16), (6, torch.float32)], ids=str
)
def test_it_is_norm_and_rotation_and_writes(width: int, dtype: torch.dtype, with_norm: bool, device: torch.device) -> None:
    """Bit by bit without the norm, in half precision; with it but for rare roundings. Values are copied."""
    case = make(width, dtype, device)
    q = case.write(with_norm)
    assert q.is_contiguous() and q.shape == (37, HEADS, width)
    qk = case.qkv[:, : HEADS + KV]
    expected = rope(norm(qk, case.weight, 1e-6, None) if with_norm else qk, case.cos, case.sin)
    keys, values = stored(case)
    found = torch.cat((q, keys), 1)
    assert torch.equal(values, case.qkv[:, HEADS + KV :])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=4 * eps)
    if dtype != torch.float32:
        assert (found != expected).float().mean() < (0.01 if with_norm else 1e-3)


def test_it_is_the_rotation_in_float64(device: torch.device) -> None:
    case = make(64, torch.float32, device)
    q = case.write(norm=True).double()
    wide = case.qkv[:, :HEADS].double()
    wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * case.weight[:HEADS].double()
    a, b = wide.chunk(2, -1)
    cos, sin = case.cos.double()[..., :32], case.sin.double()[..., 32:]
    torch.testing.assert_close(q, torch.cat((a * cos - b * sin, b * cos + a * sin), -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_are_cosines_and_signed_sines(dtype: torch.dtype, index: torch.dtype, device: torch.device) -> None:
    """Of angles in float32, up to large ones."""
    positions = torch.tensor([0, 1, 7, 4_000, 131_071, 1_000_000], dtype=index)
    frequencies = 1e6 ** -torch.linspace(0, 1, 24)
    angles = (positions[:, None].float() * frequencies).double()
    cos, sin = rope_tables(positions.to(device), frequencies.to(device), 1.25, dtype)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 3e-7}
    expected = 1.25 * torch.cat((angles.cos(), angles.cos()), -1), 1.25 * torch.cat((-angles.sin(), angles.sin()), -1)
    for found, exact in zip((cos, sin), expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found[:, 0].double().cpu(), exact, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_token_notices_another(dtype: torch.dtype, device: torch.device) -> None:
    """Alone, in another order, with indices of 64 bits: the same queries, and in the end the same pages."""
    case, other = make(64, dtype, device), make(64, dtype, device, index=torch.int64)
    whole, order = case.write(norm=True), torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(device)
    parts = [order[:1], order[1:4], order[4:21], order[21:]]
    assert torch.equal(torch.cat([other.write(True, part) for part in parts]), whole[order])
    for found, expected in zip(stored(other), stored(case), strict=True):
        assert torch.equal(found, expected)


def test_padding_tokens_get_queries_and_write_nothing(device: torch.device) -> None:
    case = make(64, torch.bfloat16, device)
    whole = case._replace(k_cache=case.k_cache.clone(), v_cache=case.v_cache.clone())
    short = case._replace(blocks=case.blocks[:30], offsets=case.offsets[:30])
    assert torch.equal(short.write(norm=False), whole.write(norm=False))
    keys, values = stored(short)
    assert len(keys) == 30 and not keys.isnan().any() and torch.equal(values, case.qkv[:30, HEADS + KV :])


def test_heads_may_be_parts_of_wider_rows(device: torch.device) -> None:
    """Of all heads together, and of single ones."""
    case, other = make(64, torch.float16, device), make(64, torch.float16, device)
    tokens, heads = case.qkv.repeat(1, 2, 1)[:, : case.qkv.shape[1]], case.qkv.repeat(1, 1, 2)[..., :64]
    q = case.write(norm=True)
    for qkv in (tokens, heads):
        assert not qkv.is_contiguous() and torch.equal(other._replace(qkv=qkv).write(norm=True), q)
        for found, expected in zip(stored(other), stored(case), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [64, 80])
def test_keys_and_values_are_written_from_any_strides(width: int, device: torch.device) -> None:
    case = make(width, torch.float16, device)
    k = torch.randn(KV, 37, width, device=device).half().transpose(0, 1)
    v = torch.randn(KV, width, 37, device=device).half().permute(2, 0, 1)
    write_kv(k, v, *case[4:])
    found = stored(case)
    assert torch.equal(found[0], k) and torch.equal(found[1], v)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    case = make(64, torch.float32, device)
    for wrong, message in (
        (case._replace(qkv=case.qkv[:, :4]), "does not go with"),
        (case._replace(qkv=case.qkv[..., :32]), "does not go with"),
        (case._replace(weight=case.weight[:3]), "norms of 5 heads"),
        (case._replace(cos=case.cos[:5]), "37 tokens need tables"),
        (case._replace(v_cache=case.k_cache), "do not go with"),
        (case._replace(k_cache=case.v_cache.transpose(2, 3)), "must lie together"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.write(norm=True)

"""Rows of a tensor copied to other rows of it: what a fork does to the state of its slot and to a block that it writes.

    x[dst[i]] = x[src[i]] for all i, everything read before anything is written

so that a destination may be a source. One program holds one piece of all the rows that are copied: what it writes,
nobody else reads, and all of its own reads come before. Pieces are narrower the more rows there are, and beyond MOST
rows what is read goes to a buffer first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._triton import Variant, fused, jit, launch, tl

MOST = 1024  # rows that one program holds pieces of
_WORDS = {1: 2048, 4: 512, 16: 128, 64: 64, 256: 32, MOST: 8}  # words of a piece by the number of rows it is held of


def copy_rows(x: Tensor, src: Tensor, dst: Tensor, dim: int = 0) -> None:
    """Copies row src[i] to dst[i]; all are read before one is written.

    x: [S, ...], or with dim=1 [layers, S, ...], of any type; what follows S lies together. src, dst: int64 or int32
    [C] in [0, S); no destination occurs twice. Raises ValueError for other shapes.
    """
    if dim not in (0, 1) or x.ndim <= dim:
        raise ValueError(f"rows are along dimension 0, or 1 after layers, not {dim} of {list(x.shape)}")
    if src.ndim != 1 or src.shape != dst.shape or src.dtype != dst.dtype or src.dtype not in (torch.int64, torch.int32):
        given = f"{src.dtype} {list(src.shape)} and {dst.dtype} {list(dst.shape)}"
        raise ValueError(f"rows are copied one to one, by int64 or int32 [C]; given {given}")
    layers = x if dim else x[None]
    if not layers[:1, :1].is_contiguous():
        raise ValueError(f"what follows the rows of {list(x.shape)} must lie together; the strides are {x.stride()}")
    if not fused(x) or len(src) > MOST:
        reference(layers, src, dst)
        return
    words, vector = _as_words(layers)
    held = next(rows for rows in _WORDS if rows >= len(src))
    pieces = -(-words.shape[2] // _WORDS[held])
    constants = {"VECTOR": vector, "ROWS": held, "WORDS": _WORDS[held]}
    sizes = (size // vector for size in (words.shape[2], *words.stride()[:2]))
    grid = (pieces if len(src) else 0, len(words))
    launch(_kernel, grid, words, src.contiguous(), dst.contiguous(), len(src), *sizes, warps=_warps(held), **constants)


def reference(layers: Tensor, src: Tensor, dst: Tensor) -> None:
    """The same in torch, for [layers, S, ...]."""
    layers[:, dst.long()] = layers[:, src.long()]


def _as_words(layers: Tensor) -> tuple[Tensor, int]:
    """Rows as [layers, S, N] of words, int32 if possible and bytes if not, and how many words can be moved at once."""
    flat = layers.flatten(2) if layers.ndim > 2 else layers[..., None]
    sizes = [size * flat.element_size() for size in (flat.shape[2], *flat.stride()[:2])]
    start = flat.storage_offset() * flat.element_size()
    if any(size % 4 for size in (*sizes, start)):
        return flat.view(torch.uint8), 1
    return flat.view(torch.int32), 1 if any(size % 16 for size in sizes) else 4


def _warps(rows: int) -> int:
    return 8 if rows >= 256 else 4


@jit(changing=("src", "dst", "count"))
def _kernel(
    x: tl.tensor,
    src: tl.tensor,
    dst: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    layer_stride: tl.tensor,
    row_stride: tl.tensor,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Width and strides are in vectors of VECTOR words: so the compiler sees that these can be moved at once."""
    row = tl.arange(0, ROWS)
    read = tl.load(src + row, mask=row < count, other=0).to(tl.int64) * row_stride * VECTOR
    written = tl.load(dst + row, mask=row < count, other=0).to(tl.int64) * row_stride * VECTOR
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    mask = (row < count)[:, None] & (word < width * VECTOR)[None, :]
    x += tl.program_id(1).to(tl.int64) * layer_stride * VECTOR
    values = tl.load(x + read[:, None] + word[None, :], mask=mask)
    tl.debug_barrier()
    tl.store(x + written[:, None] + word[None, :], values, mask=mask)


def variants() -> Iterator[Variant]:
    """Rows of any number of 16 bytes; others are rare and move less."""
    numbers = ("count", "width", "layer_stride", "row_stride")
    types = {"x": "*i32", "src": "*i64", "dst": "*i64", **dict.fromkeys(numbers, "i32")}
    for held, words in _WORDS.items():
        yield Variant(_kernel, types, {"VECTOR": 4, "ROWS": held, "WORDS": words}, _warps(held))

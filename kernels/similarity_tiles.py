"""The largest cosines between states and earlier ones of their sequences, read off pages by one kernel.

    best[p] = max over positions first[p] <= j < end[p] of  <h_p, page_j> / |h_p|

A tile is TOKENS places of a page and up to ROWS entries whose sequences have that page: the candidates of one search
read what they share once. `plan` cuts what has to be read into tiles, on the host; a program multiplies one of them.
All products have one shape, and maxima have no order: neither another entry nor another cut changes a bit.
A product is added up in SLICES parts of the width, one to a warp, whose sums are added at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._triton import INTERPRETED, Variant, constant, jit, launch, tl
from .upload import upload

TOKENS = 16
ROWS = 16
SLICES = 8
PAIRS = (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"))  # of states and pages
_SPARE = 2  # blocks at the end of a table in which neighbours that are read together may differ
_TILE_WORDS = constant(4)
LEAST_NORM = constant(1e-12)  # as torch.nn.functional.normalize has it


class Tiles(NamedTuple):
    """N tiles of P entries: parts of one upload."""

    best: Tensor  # fp32 [P], -1; becomes the result
    span: Tensor  # int32 [P, 2], the positions that count: the first one, and the one after the last
    tiles: Tensor  # int32 [N, 4]: first entry, entries, place within all pages, position of that place


def plan(tables: NDArray[Any], first: NDArray[Any], end: NDArray[Any], size: int, device: torch.device) -> Tiles:
    """What to read for P >= 1 entries whose blocks of `size` places are tables [P, C], and positions [first[p], end[p])."""
    begin, shared = _runs(tables, -(-end // size))
    run = np.repeat(np.arange(len(begin)), np.diff(begin, append=len(tables)))
    each = np.arange(len(tables))
    head = np.flatnonzero((each - begin[run]) % ROWS == 0)
    # Of every part of a run the blocks that are shared, of every entry the rest.
    entry, rows = np.append(head, each), np.append(np.diff(head, append=len(tables)), np.ones_like(each))
    low, high = np.append(np.minimum.reduceat(first, head), first), np.append(np.maximum.reduceat(end, head), end)
    left = np.maximum(low // size, np.append(np.zeros_like(head), shared[run]))
    right = np.append(shared[run[head]], -(-end // size))
    which, column = _ranges(left, right)
    # Of every block the tiles that some entry looks at.
    offset = np.arange(0, size, TOKENS)
    position = column[:, None] * size + offset
    place = tables[entry[which], column][:, None] * size + offset
    wanted = (position < high[which][:, None]) & (position + TOKENS > low[which][:, None])
    block, _ = wanted.nonzero()
    tiles = np.stack((entry[which[block]], rows[which[block]], place[wanted], position[wanted]), -1)
    return _uploaded(np.full(len(tables), -1, np.float32), np.stack((first, end), -1), tiles, device)


def _runs(tables: NDArray[Any], used: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Runs of neighbours whose tables begin alike: where each begins, and how many of `used` [P] blocks all of it share.

    Who is alone shares none.
    """
    alike = np.append(0, (tables[1:] == tables[:-1]).cumprod(-1).sum(-1))  # with the one before
    joined = alike > 0
    joined[1:] &= alike[1:] >= np.maximum(used[1:], used[:-1]) - _SPARE
    begin = np.flatnonzero(~joined)
    shared = np.minimum.reduceat(np.where(joined, np.minimum(alike, used), used), begin)
    return begin, np.where(np.diff(begin, append=len(tables)) > 1, shared, 0)


def _ranges(left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The numbers of [left[i], right[i]) for every i, one range after another: the i of each, and the number."""
    width = np.maximum(right - left, 0)
    which = np.repeat(np.arange(len(width)), width)
    return which, np.arange(len(which)) - (width.cumsum() - width - left)[which]


def _uploaded(best: NDArray[Any], span: NDArray[Any], tiles: NDArray[Any], device: torch.device) -> Tiles:
    """In one piece, every part aligned to 16 bytes."""
    words = [best.view(np.int32), span.astype(np.int32).ravel(), tiles.astype(np.int32).ravel()]
    sizes = [-(-len(part) // 4) * 4 for part in words]
    packed = np.zeros(sum(sizes), np.int32)
    for part, room in zip(words, np.split(packed, np.cumsum(sizes)[:-1]), strict=True):
        room[: len(part)] = part
    tensor = upload(packed, device)
    held = [room[: len(part)] for room, part in zip(tensor.split(sizes), words, strict=True)]
    return Tiles(held[0].view(torch.float32), held[1].view(-1, 2), held[2].view(-1, 4))


def best_cosines(states: Tensor, pages: Tensor, tiles: Tiles) -> Tensor:
    """fp32 [P], `tiles.best`; -1 where nothing is earlier. states: [P, D]; pages: [blocks, size, D], contiguous."""
    states = states.float() if INTERPRETED else fitting(states, pages)  # the interpreter would multiply the bits of bf16
    constants = _constants(half=states.dtype != torch.float32)
    launch(_kernel, (len(tiles.tiles),), states.contiguous(), pages, *tiles, *pages.shape[1:], warps=SLICES, **constants)
    return tiles.best


def fitting(states: Tensor, pages: Tensor) -> Tensor:
    """The states, contiguous: as they are where pages have their type, else in fp32."""
    return (states if states.dtype == pages.dtype else states.float()).contiguous()


def _constants(half: bool) -> dict[str, Any]:
    """`half`: tensor cores multiply the states as they are; else they are multiplied in fp32."""
    return {"HALF": half, "DEPTH": 64 if half else 16, "TOKENS": TOKENS, "ROWS": ROWS, "SLICES": SLICES}


@jit
def _kernel(
    states: tl.tensor,
    pages: tl.tensor,
    best: tl.tensor,
    span: tl.tensor,
    tiles: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    HALF: tl.constexpr,
    DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
) -> None:
    tile = tiles + tl.program_id(0) * _TILE_WORDS
    entry, rows, start, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    row, token = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    first = tl.load(span + 2 * (entry + row), mask=row < rows, other=0)
    end = tl.load(span + 2 * (entry + row) + 1, mask=row < rows, other=0)
    held = token < tl.minimum(size - position % size, tl.max(end, 0) - position)
    part = (tl.arange(0, SLICES) * DEPTH)[:, None, None] + tl.arange(0, DEPTH)[None, None, :]
    page = pages + (start + token).to(tl.int64)[None, :, None] * width + part
    state = states + (entry + row).to(tl.int64)[None, :, None] * width + part
    total = tl.zeros((SLICES, TOKENS, ROWS), tl.float32)
    square = tl.zeros((SLICES, ROWS), tl.float32)
    for begin in range(0, width, SLICES * DEPTH):
        x = tl.load(page + begin, mask=held[None, :, None] & (begin + part < width), other=0.0)
        h = tl.load(state + begin, mask=(row < rows)[None, :, None] & (begin + part < width), other=0.0)
        wide = h.to(tl.float32)
        square += tl.sum(wide * wide, 2)
        if HALF:
            total = tl.dot(x, tl.trans(h, 0, 2, 1), total)
        else:
            total = tl.dot(x.to(tl.float32), tl.trans(wide, 0, 2, 1), total, input_precision="ieee")
    norm = tl.sqrt(tl.sum(square, 0))
    cosine = tl.sum(total, 0) / tl.maximum(norm, LEAST_NORM)[None, :]
    j = (position + token)[:, None]
    counts = held[:, None] & (j >= first[None, :]) & (j < end[None, :])
    cosine = tl.minimum(tl.max(tl.where(counts, cosine, -1.0), 0), 1.0)
    tl.atomic_max(best + entry + row, cosine, mask=row < rows, sem="relaxed")


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    for states, pages in PAIRS:
        types = {"states": f"*{states}", "pages": f"*{pages}", "best": "*fp32", "span": "*i32", "tiles": "*i32"}
        yield Variant(_kernel, {**types, "size": "i32", "width": "i32"}, _constants(states != "fp32"), SLICES)

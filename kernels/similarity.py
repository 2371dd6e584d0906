"""How much a state resembles the earlier ones of its sequence: the penalty of contrastive search.

    sim[p] = max of cos(h_p, h_j) over positions j of the same sequence, position[p] - window[p] <= j < position[p]

States are held unit-normalised in pages, so a cosine is a dot product, added up in fp32. The candidates of one search
share all blocks but the last ones: neighbours whose tables begin alike form a run, which reads the blocks that begin
them once, as a matrix product with ROWS queries. All entries read their last blocks on their own. What is multiplied
has the same shape whoever else is read, so that nobody else changes a result. The kernel in similarity_tiles.py does
the same where kernels run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import Variant, fused, jit, launch, power_of_two, tl
from .similarity_tiles import LEAST_NORM, PAIRS, best_cosines, fitting, plan

ROWS = 8  # queries of one product, padded with zeros
_OWN = 2  # blocks at the end of a table that each entry reads on its own
_STATES = 1 << 19  # elements of states gathered at once


def write_states(states: Tensor, pages: Tensor, blocks: Tensor, offsets: Tensor) -> None:
    """Stores the states of T tokens, divided by their norms, token t at offset offsets[t] of block blocks[t].

    states: floating [T, D]; pages: [blocks, block size, D]; blocks, offsets: int64 or int32 [T]. Norms are fp32; a
    state of zeros stays one. No place may occur twice, but for padding tokens. Raises ValueError for shapes that do not fit.
    """
    if states.shape != (blocks.numel(), pages.shape[2]) or offsets.shape != blocks.shape:
        raise ValueError(f"{blocks.numel()} places for states of {pages.shape[2]}; given states {list(states.shape)}")
    if not fused(pages):
        pages[blocks, offsets] = unit(states).to(pages.dtype)
        return
    _check_together(pages)
    size, width = pages.shape[1:]
    args = (fitting(states, pages), pages, blocks.contiguous(), offsets.contiguous())
    block = power_of_two(width, 1024)
    launch(_write, (len(states),), *args, size, width, warps=block // 512, BLOCK=block)


def _check_together(pages: Tensor) -> None:
    if not pages.is_contiguous():
        raise ValueError(f"pages must lie together; their strides are {pages.stride()}")


def unit(states: Tensor) -> Tensor:
    """States [T, D] in fp32, divided by their norms."""
    return functional.normalize(states.float(), dim=-1)


def similarity(states: Tensor, pages: Tensor, tables: Tensor, position: Tensor, window: Tensor) -> Tensor:
    """fp32 [P] as above; -1 where nothing is earlier, and at most 1.

    states: floating [P, D], of any norm. pages: [blocks, block size, D], as `write_states` leaves them. tables: int64
    [P, C] on the CPU, the blocks of each entry's sequence. position, window: int64 [P] on the CPU; window 0 is all.
    Raises ValueError for other shapes, a position outside of its table, or pages that do not lie together on a GPU.
    """
    count, size = len(states), pages.shape[1]
    if states.shape != (count, pages.shape[2]) or tables.dim() != 2 or any(len(x) != count for x in (tables, position, window)):
        shapes = ", ".join(str(list(x.shape)) for x in (states, tables, position, window))
        raise ValueError(f"states [P, {pages.shape[2]}], tables [P, C], positions [P] and windows [P] go together, not {shapes}")
    if count == 0:
        return states.new_empty(0, dtype=torch.float32)
    if int(position.min()) < 0 or int(position.max()) > tables.shape[1] * size or int(window.min()) < 0:
        raise ValueError(f"positions must be in [0, {tables.shape[1] * size}] and windows >= 0")
    first = torch.where(window > 0, (position - window).clamp(min=0), 0)
    if fused(pages):
        _check_together(pages)
        tiles = plan(tables.numpy(), first.numpy(), position.numpy(), size, pages.device)
        return best_cosines(states, pages, tiles)
    shared = (-(-position // size) - _OWN).clamp(min=0)  # leading blocks, all of them of earlier positions
    queries = unit(states)
    out = _over_own(queries, pages, tables, shared, first, position)
    for begin, end in _runs(tables, shared):
        blocks, low = tables[begin, : shared[begin]], first[begin:end].tolist()
        for part in range(begin, end, ROWS):
            cut = slice(part, min(part + ROWS, end))
            best = _over_shared(queries[cut], pages, blocks, low[part - begin : cut.stop - begin])
            out[cut] = torch.maximum(out[cut], best)
    return out.clamp_(max=1.0)


def _runs(tables: Tensor, shared: Tensor) -> list[tuple[int, int]]:
    """Runs (begin, end) of neighbours that share their leading blocks; none of entries that have no such blocks."""
    alike = (tables[1:] == tables[:-1]).long().cumprod(-1).sum(-1)
    same = ((alike >= shared[1:]) & (shared[1:] == shared[:-1])).tolist()
    edges = [0, *(i + 1 for i, joined in enumerate(same) if not joined), len(tables)]
    return [(begin, end) for begin, end in itertools.pairwise(edges) if begin < end and shared[begin] > 0]


def _over_shared(queries: Tensor, pages: Tensor, blocks: Tensor, first: list[int]) -> Tensor:
    """The best over `blocks` [C] from position first[r] on, fp32 [r] for queries [r, D]."""
    _, size, width = pages.shape
    padded = functional.pad(queries, (0, 0, 0, ROWS - len(queries)))
    out = queries.new_full((len(queries),), -1.0)
    step = max(1, _STATES // (size * width))
    for column in range(min(first) // size // step * step, len(blocks), step):
        states = pages.index_select(0, blocks[column : column + step].to(pages.device)).view(-1, width)
        cosines = (padded @ states.float().T)[: len(queries)]
        if max(first) > column * size:
            place = torch.arange(column * size, column * size + len(states), device=out.device)
            cosines = cosines.masked_fill(place < torch.tensor(first, device=out.device)[:, None], -1.0)
        out = torch.maximum(out, cosines.amax(-1))
    return out


def _over_own(queries: Tensor, pages: Tensor, tables: Tensor, shared: Tensor, first: Tensor, position: Tensor) -> Tensor:
    """The best over the blocks after the shared ones, fp32 [P]."""
    count, width, size = *queries.shape, pages.shape[1]
    columns = shared[:, None] + torch.arange(_OWN)
    blocks = tables.gather(-1, columns.clamp(max=tables.shape[1] - 1)).to(pages.device)
    place = (columns[..., None] * size + torch.arange(size)).view(count, -1)
    earlier = ((place >= first[:, None]) & (place < position[:, None])).to(pages.device)
    step = max(1, _STATES // (_OWN * size * width))
    found = [
        (pages[blocks[i : i + step]].float().view(-1, _OWN * size, width) * queries[i : i + step, None]).sum(-1)
        for i in range(0, count, step)
    ]
    return torch.where(earlier, torch.cat(found), -1.0).amax(-1)


@jit(changing=("blocks", "offsets"))
def _write(
    states: tl.tensor,
    pages: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    token, component = tl.program_id(0), tl.arange(0, BLOCK)
    mask = component < width
    state = tl.load(states + token.to(tl.int64) * width + component, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(state * state, 0))
    place = tl.load(blocks + token).to(tl.int64) * size + tl.load(offsets + token)
    unit_state = state / tl.maximum(norm, LEAST_NORM)
    tl.store(pages + place * width + component, unit_state.to(pages.dtype.element_ty), mask=mask)


def variants() -> Iterator[Variant]:
    """`write_states` for hidden sizes up to the largest in use."""
    for states, pages in PAIRS:
        types = {"states": f"*{states}", "pages": f"*{pages}", "blocks": "*i64", "offsets": "*i64"}
        for block in (4096, 8192, 16384):
            yield Variant(_write, {**types, "size": "i32", "width": "i32"}, {"BLOCK": block}, block // 512)

"""Bans that the end of a token history calls for, for one draw: repeated n-grams, and the last tokens of words.

What may not be drawn at a position gets that position into its cell of the token table, so that nothing needs to be
taken back: a draw at another position does not mind. Semantics of `ban_repeated_ngrams` and `ban_words`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ._triton import Variant, constant, fused, jit, launch, tl
from .token_cells import BANNED_AT, insert
from .token_table import TokenTable, reference_mark

SCANNED = 512  # tokens of a history per program
WORDS = 32  # words per program of one warp
_REPEAT_FIELDS, _WORD_FIELDS = constant(4), constant(5)


def ban_repeats(table: TokenTable, history: Tensor, repeats: Tensor, longest: int) -> None:
    """Bans, for the next draw, the tokens that would repeat an n-gram of their history.

    history: int32 [H, L]. repeats: int32 [P, 4], per draw its slot of the table, its row of the history, how many tokens
    of that count, which is the position of the draw, and n >= 1; longest: the largest of these lengths, at most.
    Raises ValueError for other shapes.
    """
    _check(history, repeats, (len(repeats), 4))
    if not fused(history):
        _reference_repeats(table, history, repeats)
        return
    grid = (len(repeats), -(-longest // SCANNED))
    sizes = history.stride(0), table.cells.shape[1], table.bits.shape[1]
    launch(_repeats_kernel, grid, *table, history, repeats, *sizes, BLOCK=SCANNED)


def ban_word_ends(table: TokenTable, history: Tensor, words: Tensor, tokens: Tensor) -> None:
    """Bans, for the next draw, the last token of every word whose other tokens the history ends with.

    history: int32 [H, L]. words: int32 [W, 5], of each its slot of the table, its row of the history, how many tokens of
    that count, which is the position of the draw, and where its own tokens begin in `tokens`, int32 [N], and how many they
    are; the last one comes first. Raises ValueError for other shapes.
    """
    _check(history, words, (len(words), 5))
    if not fused(history):
        _reference_words(table, history, words, tokens)
        return
    sizes = len(words), history.stride(0), table.cells.shape[1], table.bits.shape[1]
    launch(_words_kernel, (-(-len(words) // WORDS),), *table, history, words, tokens, *sizes, warps=1, BLOCK=WORDS)


def _check(history: Tensor, records: Tensor, shape: tuple[int, int]) -> None:
    if history.ndim != 2 or history.dtype != torch.int32 or history.stride(1) != 1:
        raise ValueError(f"a history must be int32 [H, L], row by row, not {history.dtype} {list(history.shape)}")
    if records.shape != shape or records.dtype != torch.int32 or not records.is_contiguous():
        raise ValueError(f"records must be contiguous int32 {list(shape)}, not {records.dtype} {list(records.shape)}")


def _reference_repeats(table: TokenTable, history: Tensor, repeats: Tensor) -> None:
    for slot, row, length, n in repeats.tolist():
        known = history[row, :length].tolist()
        tail = known[length - n + 1 :]
        _ban(table, slot, length, [known[end] for end in range(n - 1, length) if known[end - n + 1 : end] == tail])


def _reference_words(table: TokenTable, history: Tensor, words: Tensor, tokens: Tensor) -> None:
    for slot, row, length, begin, count in words.tolist():
        last, *others = tokens[begin : begin + count].tolist()
        known = history[row, :length].tolist()
        if count <= length + 1 and others == known[length - count + 1 :][::-1]:
            _ban(table, slot, length, [last])


def _ban(table: TokenTable, slot: int, position: int, tokens: list[int]) -> None:
    ints = (torch.from_numpy(np.full(len(tokens), value, np.int32)) for value in (slot, 0, position))
    slots, state, banned_at = ints
    reference_mark(table, slots, torch.tensor(tokens, dtype=torch.int32), state, None, banned_at)


@jit
def _repeats_kernel(
    cells: tl.tensor,
    bits: tl.tensor,
    touched: tl.tensor,
    touched_count: tl.tensor,
    history: tl.tensor,
    repeats: tl.tensor,
    stride: tl.tensor,
    capacity: tl.tensor,
    groups: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    record = repeats + tl.program_id(0) * _REPEAT_FIELDS
    length, n = tl.load(record + 2), tl.load(record + 3)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = history + tl.load(record + 1).to(tl.int64) * stride
    # A column ends a repeat if the n - 1 tokens before it equal the last n - 1 tokens of the history.
    ends = (column < length) & (column >= n - 1)
    back = 1
    while (tl.max(ends.to(tl.int32), 0) > 0) & (back < n):
        ends = ends & (tl.load(known + column - back, mask=ends, other=-1) == tl.load(known + length - back))
        back += 1
    if tl.max(ends.to(tl.int32), 0) > 0:
        token = tl.where(ends, tl.load(known + column, mask=ends, other=0), column)
        slot = tl.zeros_like(column) + tl.load(record)
        cell, ends = insert(cells, bits, touched, touched_count, slot, token, ends, capacity, groups)
        tl.store(cell + BANNED_AT, tl.zeros_like(column) + length, mask=ends)


@jit(changing=("tokens", "count"))
def _words_kernel(
    cells: tl.tensor,
    bits: tl.tensor,
    touched: tl.tensor,
    touched_count: tl.tensor,
    history: tl.tensor,
    words: tl.tensor,
    tokens: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    capacity: tl.tensor,
    groups: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < count
    record = words + lane * _WORD_FIELDS
    slot = tl.load(record, mask=inside, other=0)
    length = tl.load(record + 2, mask=inside, other=0)
    size = tl.load(record + 4, mask=inside, other=0)
    known = history + tl.load(record + 1, mask=inside, other=0).to(tl.int64) * stride
    word = tokens + tl.load(record + 3, mask=inside, other=0)
    ends = inside & (size <= length + 1)
    back = 1
    while tl.max(tl.where(ends, size, 0), 0) > back:
        more = ends & (back < size)
        differs = tl.load(word + back, mask=more, other=-1) != tl.load(known + length - back, mask=more, other=-1)
        ends = ends & (differs == 0)
        back += 1
    token = tl.where(ends, tl.load(word, mask=ends, other=0), lane)
    cell, ends = insert(cells, bits, touched, touched_count, slot, token, ends, capacity, groups)
    tl.store(cell + BANNED_AT, length, mask=ends)


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    table = {"cells": "*i32", "bits": "*i64", "touched": "*i32", "touched_count": "*i32", "history": "*i32"}
    sizes = {"stride": "i32", "capacity": "i32", "groups": "i32"}
    yield Variant(_repeats_kernel, {**table, "repeats": "*i32", **sizes}, {"BLOCK": SCANNED})
    yield Variant(_words_kernel, {**table, "words": "*i32", "tokens": "*i32", "count": "i32", **sizes}, {"BLOCK": WORDS}, warps=1)

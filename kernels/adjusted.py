"""What bans, bias and penalties make of a logit, computed where it is read: no adjusted copy of a row is ever made.

    y = -inf                                 if the token is banned, else x + bias
    y = y / r if y > 0 else y * r            if it occurs in prompt or output        (repetition penalty r)
    y = y - (f count + q)                    if it occurs in the output, count times (frequency f, presence q)

Which tokens differ from the model is in the `TokenTable` of their slot. Order and rounding are those of the stages
`ban_tokens`, `apply_logit_bias` and `apply_penalties`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._triton import constant, jit, tl
from .entries import (
    ADJUSTED,
    COUNTED,
    ENTRY,
    FLAGS,
    FREQUENCY,
    NO_END,
    ONLY,
    POSITION,
    PRESENCE,
    REPETITION,
    SLOT,
    Entry,
    entry_float,
    entry_int,
)
from .scratch import GROUP
from .token_cells import ALLOWED, BANNED, BANNED_AT, BIAS, CELL, COUNT, END, PROMPT, STATE, State, find
from .token_table import TokenTable

_GROUP = constant(GROUP)
_LANES = constant(8)  # marked tokens of a group that are computed at once


def adjusted_rows(values: Tensor, entries: Tensor, table: TokenTable) -> Tensor:
    """The values y of whole rows x, fp32 [P, V], one of each entry: in torch, row by row, for tables on the CPU."""
    out = values.clone()
    for y, entry in zip(out, entries.numpy().view(ENTRY)[:, 0], strict=True):
        if entry["flags"] & Entry.ADJUSTED:
            cells = table.cells[int(entry["slot"])]
            key, state, bias, banned_at = cells[cells[:, 0] > 0].unbind(1)
            token = key.long() - 1
            adjusted = _adjusted_tokens(y[token], state, bias.view(torch.float32), banned_at, entry)
            if entry["flags"] & Entry.ONLY:
                y.fill_(-torch.inf)
            y[token] = adjusted
    return out


def _adjusted_tokens(x: Tensor, state: Tensor, bias: Tensor, banned_at: Tensor, entry: np.void) -> Tensor:
    banned = ((state & State.BANNED) != 0) | (banned_at == int(entry["position"]))
    if entry["flags"] & Entry.ONLY:
        banned |= (state & State.ALLOWED) == 0
    if entry["flags"] & Entry.NO_END:
        banned |= (state & State.END) != 0
    y = torch.where(banned, -torch.inf, x + bias)
    if not entry["flags"] & Entry.COUNTED:
        return y
    count = state & State.COUNT
    repetition, frequency, presence = (torch.tensor(entry[name]) for name in ("repetition", "frequency", "presence"))
    seen = ((state & State.PROMPT) != 0) | (count > 0)
    y = torch.where(seen, torch.where(y > 0, y / repetition, y * repetition), y)
    return torch.where(count > 0, y - (frequency * count.float() + presence), y)


@jit
def group_values(
    row: tl.tensor,
    group: tl.tensor,
    valid: tl.tensor,
    vocab: tl.tensor,
    entry: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    top: tl.tensor,
    log_scale: tl.tensor,
    ADJUST: tl.constexpr,
    LOG_PROBS: tl.constexpr,
) -> tl.tensor:
    """fp32 [N, GROUP]: the values of groups [N] of one entry, -inf where not `valid` [N] and past the vocabulary.

    row: pointer to the entry's logits. cells, bits: the token table. With LOG_PROBS the model's log-probs
    (x - top) + log_scale (an fp32 and a float64 scalar) take the logits' place; what ADJUST says applies to either.
    """
    column = tl.arange(0, _GROUP)[None, :]
    token = group[:, None] * _GROUP + column
    x = _model_values(row, token, valid[:, None] & (token < vocab), top, log_scale, LOG_PROBS)
    if ADJUST:
        flags = entry_int(entry, FLAGS)
        if flags & ADJUSTED:
            slot = entry_int(entry, SLOT).to(tl.int64)
            word = tl.load(bits + slot * tl.cdiv(vocab, _GROUP) + group, mask=valid, other=0)
            own = cells + slot * capacity * CELL
            # Few tokens of a group are marked: theirs are computed side by side and put where they belong.
            low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
            half = tl.where(column < 32, low[:, None], high[:, None])
            bit = tl.full([1, _GROUP], 1, tl.uint32) << (column & 31).to(tl.uint32)
            before = tl.where(column < 32, 0, _ones(low)[:, None]) + _ones(half & (bit - 1))
            which = tl.where((half & bit) != 0, before, -1)
            most = tl.max(_ones(low) + _ones(high), 0) - 1
            x = tl.where((flags & ONLY) != 0, -float("inf"), x)
            first = 0
            while first <= most:
                offset, there, word = _lowest_bits(word)
                some = group[:, None] * _GROUP + offset
                y = _model_values(row, some, there, top, log_scale, LOG_PROBS)
                y = adjusted_values(y, find(own, some, there, capacity), there, entry, flags)
                place = which - first
                here = (place >= 0) & (place < _LANES)
                x = tl.where(here, _spread(y, place & (_LANES - 1)), x)
                first += _LANES
    return x


@jit
def _spread(y: tl.tensor, place: tl.tensor) -> tl.tensor:
    """y[n, place[n, t]] for y [N, _LANES], place [N, GROUP]."""
    # Triton 3.6 does not compile a gather from fewer values than a program has threads: 32 where N is 4, else up to 256.
    if y.shape[0] == 4 or y.shape[0] >= 32:
        out = tl.gather(y, place, 1)
    else:
        lane = tl.arange(0, y.shape[1])[None, None, :]
        out = tl.sum(tl.where(place[:, :, None] == lane, y[:, None, :], 0.0), 2)
    return out


@jit
def values_of(
    row: tl.tensor,
    token: tl.tensor,
    vocab: tl.tensor,
    entry: tl.tensor,
    cells: tl.tensor,
    bits: tl.tensor,
    capacity: tl.tensor,
    ADJUST: tl.constexpr,
) -> tl.tensor:
    """fp32 [N, 1]: the values of tokens int32 [N, 1] of one entry, -inf outside of the vocabulary. As `group_values` else."""
    inside = (token >= 0) & (token < vocab)
    x = _model_values(row, token, inside, 0.0, 0.0, False)
    if ADJUST:
        flags = entry_int(entry, FLAGS)
        if flags & ADJUSTED:
            slot = entry_int(entry, SLOT).to(tl.int64)
            word = tl.load(bits + slot * tl.cdiv(vocab, _GROUP) + token // _GROUP, mask=inside, other=0)
            marked = inside & (((word >> (token % _GROUP).to(tl.int64)) & 1) != 0)
            cell = find(cells + slot * capacity * CELL, token, marked, capacity)
            y = adjusted_values(x, cell, marked, entry, flags)
            x = tl.where(marked, y, tl.where((flags & ONLY) != 0, -float("inf"), x))
    return x


@jit
def _model_values(
    row: tl.tensor, token: tl.tensor, mask: tl.tensor, top: tl.tensor, log_scale: tl.tensor, LOG_PROBS: tl.constexpr
) -> tl.tensor:
    x = tl.load(row + token, mask=mask, other=-float("inf")).to(tl.float32)
    if LOG_PROBS:
        x = ((x - top).to(tl.float64) + log_scale.to(tl.float64)).to(tl.float32)
    return x


@jit
def _ones(word: tl.tensor) -> tl.tensor:
    """int32: how many bits of uint32 words are set."""
    # Written as compilers know it: they make one instruction of it.
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@jit
def _lowest_bits(word: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where the lowest set bits of words int64 [N] are, [N, _LANES]; which of these are there; the words without them."""
    lane = tl.arange(0, _LANES)[None, :]
    left = word[:, None] + tl.zeros_like(lane).to(tl.int64)
    for bit in tl.static_range(_LANES - 1):
        left = tl.where(bit < lane, left & (left - 1), left)
    # A power of two as a float: its exponent.
    exponent = ((left & -left).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
    rest = tl.sum(tl.where(lane == _LANES - 1, left & (left - 1), 0), 1)
    return tl.where(left != 0, exponent - 127, 0), left != 0, rest


@jit
def adjusted_values(x: tl.tensor, cell: tl.tensor, mask: tl.tensor, entry: tl.tensor, flags: tl.tensor) -> tl.tensor:
    """Of tokens with values x and cells; all [N, M]."""
    state = tl.load(cell + STATE, mask=mask, other=0)
    bias = tl.load(cell + BIAS, mask=mask, other=0).to(tl.float32, bitcast=True)
    banned_at = tl.load(cell + BANNED_AT, mask=mask, other=0)
    banned = ((state & BANNED) != 0) | (banned_at == entry_int(entry, POSITION))
    banned = banned | (((flags & ONLY) != 0) & ((state & ALLOWED) == 0)) | (((flags & NO_END) != 0) & ((state & END) != 0))
    y = tl.where(banned, -float("inf"), x + bias)
    if flags & COUNTED:
        count = state & COUNT
        repetition = entry_float(entry, REPETITION)
        repeated = tl.where(y > 0, tl.div_rn(y, repetition), y * repetition)
        y = tl.where(((state & PROMPT) != 0) | (count > 0), repeated, y)
        often = entry_float(entry, FREQUENCY) * count.to(tl.float32) + entry_float(entry, PRESENCE)
        y = tl.where(count > 0, y - often, y)
    return y

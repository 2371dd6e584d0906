"""What bans, bias and penalties make of a logit, computed where it is read: no adjusted copy of a row is ever made.

    y = -inf                                 if the token is banned, else x + bias
    y = y / r if y > 0 else y * r            if it occurs in prompt or output        (repetition penalty r)
    y = y - (f count + q)                    if it occurs in the output, count times (frequency f, presence q)

Which tokens differ from the model is in the `TokenTable` of their slot. Order and rounding are those of the stages
`ban_tokens`, `apply_logit_bias` and `apply_penalties`.
"""

from __future__ import annotations

from ._triton import constant, jit, tl
from .entries import (
    ADJUSTED,
    COUNTED,
    FLAGS,
    FREQUENCY,
    NO_END,
    ONLY,
    POSITION,
    PRESENCE,
    REPETITION,
    SLOT,
    entry_float,
    entry_int,
)
from .scratch import GROUP

# A cell of a token table, in 32-bit words: the token (-1: free), its state, its bias (fp32), the position of a draw that
# may not take it (-1: none).
CELL = constant(4)
STATE, BIAS, BANNED_AT = constant(1), constant(2), constant(3)
# The state: how often it occurs in the output, and what else is known of it.
COUNT = constant((1 << 24) - 1)
PROMPT, BANNED, END, ALLOWED = (constant(1 << bit) for bit in (24, 25, 26, 27))

_GROUP = constant(GROUP)


@jit
def first_place(token: tl.tensor, capacity: tl.tensor) -> tl.tensor:
    """Where the search for a token begins; capacity: a power of two."""
    return (token * -1640531527 ^ (token >> 5)) & (capacity - 1)


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
    (x - top) + log_scale (fp32 scalars) take the logits' place; what ADJUST says applies to either.
    """
    token = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    inside = valid[:, None] & (token < vocab)
    x = tl.load(row + token, mask=inside, other=-float("inf")).to(tl.float32)
    if LOG_PROBS:
        x = ((x - top).to(tl.float64) + log_scale.to(tl.float64)).to(tl.float32)
    if ADJUST:
        flags = entry_int(entry, FLAGS)
        if flags & ADJUSTED:
            slot = entry_int(entry, SLOT).to(tl.int64)
            word = tl.load(bits + slot * tl.cdiv(vocab, _GROUP) + group, mask=valid, other=0)
            marked = inside & (((word[:, None] >> tl.arange(0, _GROUP)[None, :].to(tl.int64)) & 1) != 0)
            x = _adjusted(x, token, marked, entry, flags, cells + slot * capacity * CELL, capacity)
    return x


@jit
def _adjusted(
    x: tl.tensor,
    token: tl.tensor,
    marked: tl.tensor,
    entry: tl.tensor,
    flags: tl.tensor,
    cells: tl.tensor,
    capacity: tl.tensor,
) -> tl.tensor:
    """cells: those of the entry's slot; they hold every token that is `marked`."""
    place = first_place(token, capacity)
    pending = marked
    while tl.max(tl.max(pending.to(tl.int32), 1), 0) > 0:
        found = tl.load(cells + place * CELL, mask=pending, other=-1)
        pending = pending & (found != token)
        place = tl.where(pending, (place + 1) & (capacity - 1), place)
    cell = cells + place * CELL
    state = tl.load(cell + STATE, mask=marked, other=0)
    bias = tl.load(cell + BIAS, mask=marked, other=0).to(tl.float32, bitcast=True)
    banned_at = tl.load(cell + BANNED_AT, mask=marked, other=-1)
    only = (flags & ONLY) != 0
    banned = ((state & BANNED) != 0) | (banned_at == entry_int(entry, POSITION)) | (only & ((state & ALLOWED) == 0))
    banned = banned | (((state & END) != 0) & ((flags & NO_END) != 0))
    y = tl.where(banned, -float("inf"), x + bias)
    if flags & COUNTED:
        count = state & COUNT
        repetition = entry_float(entry, REPETITION)
        repeated = tl.where(y > 0, tl.div_rn(y, repetition), y * repetition)
        y = tl.where(((state & PROMPT) != 0) | (count > 0), repeated, y)
        often = entry_float(entry, FREQUENCY) * count.to(tl.float32) + entry_float(entry, PRESENCE)
        y = tl.where(count > 0, y - often, y)
    return tl.where(marked, y, tl.where(only, -float("inf"), x))

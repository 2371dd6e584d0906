"""What a cell of a token table holds, and how a program finds one.

A slot's cells are a hash table of tokens: a token is in the first cell from its first place on that does not hold another
one. Nothing is taken out but by clearing a slot.
"""

from __future__ import annotations

from ._triton import constant, jit, tl
from .scratch import GROUP

# In 32-bit words: the token + 1, its state, its bias (fp32), the position of a draw that may not take it. All are 0 where
# a cell is free, and no draw has position 0.
WORDS = 4
CELL = constant(WORDS)
STATE, BIAS, BANNED_AT = constant(1), constant(2), constant(3)


class State:
    """Bits of a state: how often the token occurs in the output, and what else is known of it."""

    COUNT = (1 << 24) - 1
    PROMPT = 1 << 24
    BANNED = 1 << 25
    END = 1 << 26
    ALLOWED = 1 << 27


COUNT, PROMPT, BANNED = constant(State.COUNT), constant(State.PROMPT), constant(State.BANNED)
END, ALLOWED = constant(State.END), constant(State.ALLOWED)

_GROUP = constant(GROUP)
_NEVER = constant(-1)  # what no cell begins with


@jit
def first_place(token: tl.tensor, capacity: tl.tensor) -> tl.tensor:
    """Where the search for a token begins: the top bits of a product (Knuth's multiplicative hash)."""
    spread = (token.to(tl.uint32) * 2654435769).to(tl.uint32)
    return tl.umulhi(spread, tl.zeros_like(spread) + capacity.to(tl.uint32)).to(tl.int32)


@jit
def insert(
    cells: tl.tensor,
    bits: tl.tensor,
    touched: tl.tensor,
    touched_count: tl.tensor,
    slot: tl.tensor,
    token: tl.tensor,
    active: tl.tensor,
    capacity: tl.tensor,
    groups: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Pointers to the cells of tokens, made where they are missing, and where there are such, all [N].

    slot, token: int32 [N], at least one to a thread. Where not active, any slot of the table and any token: a swap has no
    mask, so these threads swap in vain, best each at a place of its own. In a slot that is full the search ends.
    """
    own = cells + slot.to(tl.int64) * capacity * CELL
    place = first_place(token, capacity)
    pending = active
    made = pending & False
    steps = 0
    key = token + 1
    while (tl.max(pending.to(tl.int32), 0) > 0) & (steps < capacity):
        found = tl.load(own + place * CELL, mask=pending, other=_NEVER)
        free = pending & (found == 0)
        if tl.max(free.to(tl.int32), 0) > 0:
            held = tl.atomic_cas(own + place * CELL, tl.where(free, 0, _NEVER), key, sem="relaxed")
            taken = free & (held == 0)
            made = made | taken
            found = tl.where(taken, key, tl.where(free, held, found))
        pending = pending & (found != key)
        place = tl.where(pending, (place + 1) & (capacity - 1), place)
        steps += 1
    group = token // _GROUP
    words = slot.to(tl.int64) * groups
    bit = tl.full(token.shape, 1, tl.int64) << (token % _GROUP).to(tl.int64)
    before = tl.atomic_or(bits + words + group, bit, mask=made, sem="relaxed")
    first = made & (before == 0)
    index = tl.atomic_add(touched_count + slot, 1, mask=first, sem="relaxed")
    tl.store(touched + words + index, group, mask=first)
    return own + place * CELL, active & (pending == 0)


@jit
def find(cells: tl.tensor, token: tl.tensor, wanted: tl.tensor, capacity: tl.tensor) -> tl.tensor:
    """Pointers to the cells of tokens [N, M], among the cells of one slot; it holds all that are `wanted` [N, M].

    A search ends once all cells are seen: nothing in memory may hang a device.
    """
    place = first_place(token, capacity)
    pending = wanted
    steps = 0
    while (tl.max(tl.max(pending.to(tl.int32), 1), 0) > 0) & (steps < capacity):
        found = tl.load(cells + place * CELL, mask=pending, other=0)
        pending = pending & (found != token + 1)
        place = tl.where(pending, (place + 1) & (capacity - 1), place)
        steps += 1
    return cells + place * CELL

"""The kernel that does tasks of attention: it walks through pages, a tile of keys for all rows of a task at a time.

A row is a token and one of the query heads that share a KV head. Keys that a row does not see weigh exactly 0 and tiles of
keys begin at fixed positions, so that nobody else in a task changes a bit.

Functions pass on `sums`, as in `attention_parts.py`; `pages`: K and V of a KV head, a table, and the KV heads of a block;
`sight`: the first key that each row sees [R] and the last [R], the latest of the first and the earliest of the last.
"""

from __future__ import annotations

from ._rounding import rounded
from ._triton import INTERPRETED, constant, jit, tl
from .attention_parts import completed, joined
from .attention_tasks import WORDS

FOREVER = 1 << 30  # a position behind all others; a window that hides nothing
_FOREVER = constant(FOREVER)
_WORDS = constant(WORDS)
_WIDENS = constant(INTERPRETED)  # the interpreter would multiply the bits of bfloat16


@jit
def _operand(x: tl.tensor) -> tl.tensor:
    """As tl.dot takes it."""
    return x.to(tl.float32) if _WIDENS else x


@jit
def _capped(product: tl.tensor, rate: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """cap * tanh(rate / 2 * product), by powers of e, as `rate` has it in base 2, which can't overflow."""
    fall = tl.exp2(-tl.abs(product * rate))
    high = (1.0 - fall) / (1.0 + fall) * cap
    return tl.where(product < 0, -high, high)


@jit
def _after_tile(
    sums: tl.tuple,
    query: tl.tensor,
    pages: tl.tuple,
    start: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    sight: tl.tuple,
    rate: tl.tensor,
    cap: tl.tensor,
    HIDES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tuple:
    """`sums` and the KEYS keys from `start` on; with HIDES only those in [first, end), and of each row those that it sees."""
    k_pages, v_pages, table, kv_heads = pages
    values, peak, total = sums
    key = tl.multiple_of(start + tl.arange(0, KEYS), KEYS)
    depth, width = tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    if HIDES:
        # VECTOR neighbours of a block are read at once, so they are read if one of them is; scores of the others are hidden.
        vector = key // VECTOR * VECTOR
        near = (vector + VECTOR > first) & (vector < end)
        inside = (key >= first) & (key < end)  # values outside may be NaN, which 0 does not hide
    else:
        near = tl.full((KEYS,), True, tl.int1)
        inside = near
    block = tl.load(table + key // BLOCK_SIZE, mask=near, other=0).to(tl.int64) * kv_heads
    k_place = tl.max_contiguous(tl.multiple_of(block * (SIZE * BLOCK_SIZE) + key % BLOCK_SIZE, VECTOR), VECTOR)
    k_mask = near[None, :] if SIZE == DEPTH else near[None, :] & (depth < SIZE)[:, None]
    k = tl.load(k_pages + k_place[None, :] + (depth * BLOCK_SIZE)[:, None], mask=k_mask, other=0.0)
    product = tl.dot(query, _operand(k), input_precision="ieee")
    score = _capped(product, rate, cap) if HAS_CAP else product * rate
    if HIDES:
        score = tl.where((key[None, :] >= sight[0][:, None]) & (key[None, :] <= sight[1][:, None]), score, -float("inf"))
    highest = tl.maximum(peak, tl.max(score, 1))
    level = tl.where(highest == -float("inf"), 0.0, highest)
    weight, fade = tl.exp2(score - level[:, None]), tl.exp2(peak - level)
    v_place = (block * BLOCK_SIZE + key % BLOCK_SIZE) * VALUE_SIZE
    v_mask = inside[:, None] if VALUE_SIZE == WIDTH else inside[:, None] & (width < VALUE_SIZE)[None, :]
    v = tl.load(v_pages + v_place[:, None] + width[None, :], mask=v_mask, other=0.0)
    total = total * fade + tl.sum(weight, 1)
    weight = _operand(rounded(weight, v_pages.dtype.element_ty))
    values = tl.dot(weight, _operand(v), values * fade[:, None], input_precision="ieee")
    return values, highest, total


@jit
def _walked(
    query: tl.tensor,
    pages: tl.tuple,
    first: tl.tensor,
    end: tl.tensor,
    sight: tl.tuple,
    rate: tl.tensor,
    cap: tl.tensor,
    HAS_CAP: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tuple:
    """Partial results of the keys [first, end). Nothing is masked in the tiles that all rows see whole, if they come first."""
    nothing = tl.full((query.shape[0],), -float("inf"), tl.float32)
    sums = tl.zeros((query.shape[0], WIDTH), tl.float32), nothing, tl.zeros((query.shape[0],), tl.float32)
    begin = first // KEYS * KEYS
    hides = tl.where(tl.maximum(first, sight[2]) > begin, begin, tl.maximum(tl.minimum(sight[3] + 1, end) // KEYS * KEYS, begin))
    for start in range(begin, hides, KEYS):
        sums = _after_tile(
            sums, query, pages, start, first, end, sight, rate, cap,
            False, HAS_CAP, KEYS, BLOCK_SIZE, VECTOR, SIZE, DEPTH, VALUE_SIZE, WIDTH,
        )  # fmt: skip
    for start in range(hides, end, KEYS):
        sums = _after_tile(
            sums, query, pages, start, first, end, sight, rate, cap,
            True, HAS_CAP, KEYS, BLOCK_SIZE, VECTOR, SIZE, DEPTH, VALUE_SIZE, WIDTH,
        )  # fmt: skip
    return sums


@jit(changing=("records", "count", "part", "positions"))
def attend(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    sinks: tl.tensor,
    records: tl.tensor,
    count: tl.tensor,
    part: tl.tensor,
    positions: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    state: tl.tensor,
    kv_heads: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    columns: tl.tensor,
    window: tl.tensor,
    rate: tl.tensor,
    cap: tl.tensor,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    INVARIANT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Programs take turns at pieces of tasks: ROWS // GROUP tokens of one KV head. Rows that are left over see nothing."""
    row, depth, width = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    for item in range(tl.program_id(0), tl.load(count) * kv_heads * PIECES, tl.num_programs(0)):
        kv_head = item % kv_heads
        piece = item // kv_heads % PIECES
        record = records + item // kv_heads // PIECES * _WORDS
        slot, first, end, whole = tl.load(record + 2), tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
        cut = first // SPLIT
        place = piece * (ROWS // GROUP) + row // GROUP
        held = (place < tl.load(record + 1)) & (row // GROUP < ROWS // GROUP)
        token = tl.load(record) + place
        position = tl.load(positions + token, mask=held, other=-1).to(tl.int32)
        seen = tl.maximum(position - window + 1, 0)
        sight = seen, position, tl.max(seen, 0), tl.min(tl.where(held, position, _FOREVER), 0)
        if PIECES > 1:
            first = tl.maximum(first, tl.min(tl.where(held, seen, _FOREVER), 0))
            end = tl.minimum(end, tl.max(position, 0) + 1)
        head = kv_head * GROUP + row % GROUP
        q_mask = held[:, None] if SIZE == DEPTH else held[:, None] & (depth < SIZE)[None, :]
        query = tl.load(
            q + (token.to(tl.int64) * q_stride + head * q_head_stride)[:, None] + depth[None, :], mask=q_mask, other=0.0
        )
        query = _operand(query)
        k_pages, v_pages = k_cache + kv_head * (SIZE * BLOCK_SIZE), v_cache + kv_head * (VALUE_SIZE * BLOCK_SIZE)
        pages = k_pages, v_pages, table + slot.to(tl.int64) * columns, kv_heads
        if INVARIANT:
            nothing = tl.full((ROWS,), -float("inf"), tl.float32)
            sums = tl.zeros((ROWS, WIDTH), tl.float32), nothing, tl.zeros((ROWS,), tl.float32)
            for split in range(first // SPLIT, tl.cdiv(end, SPLIT)):
                more = _walked(
                    query, pages, tl.maximum(first, split * SPLIT), tl.minimum(end, split * SPLIT + SPLIT), sight, rate, cap,
                    HAS_CAP, KEYS, BLOCK_SIZE, VECTOR, SIZE, DEPTH, VALUE_SIZE, WIDTH,
                )  # fmt: skip
                sums = joined(sums, more)
        else:
            sums = _walked(
                query, pages, first, end, sight, rate, cap,
                HAS_CAP, KEYS, BLOCK_SIZE, VECTOR, SIZE, DEPTH, VALUE_SIZE, WIDTH,
            )  # fmt: skip
        latest, earliest = tl.where(whole != 0, _FOREVER, cut), tl.where(whole != 0, 0, cut)
        counts = held & (seen // SPLIT <= latest) & (position // SPLIT >= earliest)
        own = tl.load(part + token, mask=counts, other=0)
        parts = tl.load(part + token + 1, mask=counts, other=0) - own
        inside = (width < VALUE_SIZE)[None, :]
        if whole == 0:
            several = counts & (parts != 0)
            at = (own + cut - seen // SPLIT).to(tl.int64) * (kv_heads * GROUP) + head
            tl.store(partial + at[:, None] * VALUE_SIZE + width[None, :], sums[0], mask=several[:, None] & inside)
            tl.store(state + at * 2, sums[1], mask=several)
            tl.store(state + at * 2 + 1, sums[2], mask=several)
        sink = tl.load(sinks + head) if HAS_SINKS else 0.0
        result = rounded(completed(sums, sink, HAS_SINKS), out.dtype.element_ty)
        to = out + (token.to(tl.int64) * (kv_heads * GROUP) + head)[:, None] * VALUE_SIZE + width[None, :]
        tl.store(to, result, mask=(counts & (parts == 0))[:, None] & inside)

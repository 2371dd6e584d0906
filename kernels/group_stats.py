"""The one pass over the logits: of every group of GROUP tokens, the largest value and the mass beside it.

    top[p, g]  = max of x[row[p], t] over the tokens t of group g
    mass[p, g] = sum of round(2^23 exp((x[row[p], t] - top[p, g]) / temperature))

All that follows reads these records, 8 bytes for 64 tokens, and of the logits only the groups that matter. Masses are
integers and maxima exact, so that a record is the same bits whatever else is computed and however it is cut.
NaN counts as +inf: a row whose largest top is not finite is bad.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import check_logits
from ._triton import Variant, constant, fused, jit, launch, tl
from .entries import (
    ENTRY_WORDS,
    FLAGS,
    ONLY,
    OWN,
    ROW,
    TEMPERATURE,
    Entry,
    check_entries,
    entry_float,
    entry_int,
)
from .scratch import GROUP

TILE = 64  # groups per program
UNIT = 2.0**23  # of a mass: the largest value of a group weighs this
_GROUP = constant(GROUP)
_LOG2_E = constant(1.4426950408889634)


class GroupStats(NamedTuple):
    """Records of P entries and G groups: [0] of the model's distribution, [1] of those entries that have one of their own.

    What [1] says of an entry without OWN means nothing. There is no [1] where no entry has it.
    """

    top: Tensor  # fp32 [1 or 2, P, G]
    mass: Tensor  # int32 [1 or 2, P, G], in units of 2^-23 of the weight that `top` has


def group_stats(logits: Tensor, entries: Tensor, own: bool) -> GroupStats:
    """logits: floating [U, V], rows of any stride; entries: int32 [P, WORDS] of `ENTRY`; own: whether any is OWN.

    Records [1] are those at the entry's temperature; of an entry that is ONLY they are empty: -inf and 0. What its table
    changes comes later. Raises ValueError for other shapes.
    """
    check_logits(logits)
    check_entries(entries, logits)
    if logits.stride(1) != 1:
        raise ValueError("logits must lie together row by row")
    if not fused(logits):
        return reference(logits, entries, own)
    vocab, count = logits.shape[1], len(entries)
    shape = (1 + own, count, -(-vocab // GROUP))
    top = torch.empty(shape, dtype=torch.float32, device=logits.device)
    mass = torch.empty(shape, dtype=torch.int32, device=logits.device)
    grid = (count, -(-shape[2] // TILE))
    launch(_kernel, grid, logits, entries, top, mass, logits.stride(0), vocab, HAS_OWN=own, TILE=TILE)
    return GroupStats(top, mass)


def reference(logits: Tensor, entries: Tensor, own: bool) -> GroupStats:
    """In torch; the same values but for the last bits of exp."""
    row, flags = entries[:, 0].long(), entries[:, 1]
    temperature = entries[:, 2].view(torch.float32)
    vocab = logits.shape[1]
    wide = torch.nn.functional.pad(logits.float(), (0, -vocab % GROUP), value=-torch.inf)[row].view(len(row), -1, GROUP)
    wide = wide.masked_fill(wide.isnan(), torch.inf)
    top = wide.amax(-1)
    depth = wide - top.masked_fill(top == -torch.inf, 0.0)[..., None]
    heats = [torch.ones_like(temperature), temperature][: 1 + own]
    masses = [(depth / heat[:, None, None]).exp_().mul_(UNIT).round_().nan_to_num(0.0).sum(-1).int() for heat in heats]
    tops = [top, top.clone()][: 1 + own]
    if own:
        only = (flags & int(Entry.ONLY)) != 0
        tops[1][only], masses[1][only] = -torch.inf, 0
    return GroupStats(torch.stack(tops), torch.stack(masses))


@jit
def token_mass(x: tl.tensor, top: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """int32: what values add to the mass of a group whose largest value is `top`, finite."""
    # Adding 1 leaves the weight, rounded to units, in the mantissa: no conversion, and integers add up in any order.
    weight = tl.exp2((x - top) * fall_rate(temperature)) + 1.0
    return weight.to(tl.int32, bitcast=True) - 0x3F800000


@jit
def fall_rate(temperature: tl.tensor) -> tl.tensor:
    """What the base-2 logarithm of a weight falls by for every unit of value."""
    return _LOG2_E / temperature


@jit
def group_mass(x: tl.tensor, top: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """int32 [N] of values x [N, GROUP] and the largest of each group, top [N]."""
    return tl.sum(token_mass(x, tl.where(top == -float("inf"), 0.0, top)[:, None], temperature), 1)


@jit
def _kernel(
    logits: tl.tensor,
    entries: tl.tensor,
    top_out: tl.tensor,
    mass_out: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    HAS_OWN: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    entry = entries + tl.program_id(0) * ENTRY_WORDS
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    row = logits + entry_int(entry, ROW).to(tl.int64) * stride
    x = tl.load(row + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    top = tl.max(x, 1)
    groups = tl.cdiv(vocab, _GROUP)
    place = tl.program_id(0).to(tl.int64) * groups + group
    tl.store(top_out + place, top, mask=group < groups)
    tl.store(mass_out + place, group_mass(x, top, 1.0), mask=group < groups)
    if HAS_OWN:
        flags = entry_int(entry, FLAGS)
        if flags & OWN:
            place += tl.num_programs(0).to(tl.int64) * groups
            mass = group_mass(x, top, entry_float(entry, TEMPERATURE))
            only = (flags & ONLY) != 0
            tl.store(top_out + place, tl.where(only, -float("inf"), top), mask=group < groups)
            tl.store(mass_out + place, tl.where(only, 0, mass), mask=group < groups)


def variants() -> Iterator[Variant]:
    """Every configuration that is launched."""
    for dtype in ("bf16", "fp16", "fp32"):
        for own in (False, True):
            types = {
                "logits": f"*{dtype}",
                "entries": "*i32",
                "top_out": "*fp32",
                "mass_out": "*i32",
                "stride": "i64",
                "vocab": "i32",
            }
            yield Variant(_kernel, types, {"HAS_OWN": own, "TILE": TILE})

"""Counting what each group costs, step by step, with array operations over all groups."""

from __future__ import annotations

import numpy as np

from .accounting import Trace
from .group import Group
from .kv_manager import KVManager, Written
from .plan import Ints
from .planning import Chosen
from .sequences import tally


def count(chosen: Chosen, written: Written, kv: KVManager, groups: dict[int, Group]) -> list[Group]:
    """Add the rows of a step, and the blocks copied for it, to the usage of their groups; who these are."""
    table = kv.table
    numbers, group_of = np.unique(table.group[chosen.seqs], return_inverse=True)
    tokens = np.bincount(group_of, chosen.end - chosen.start).astype(np.int64).tolist()
    found = [groups[number] for number in numbers.tolist()]
    several = False
    for group, computed in zip(found, tokens, strict=True):
        group.flights += 1
        group.usage.forward_tokens += computed
        several |= group.live > 1
    if len(written.src):
        for number, copied in tally(table.group[written.seq[: len(written.src)]]):
            groups[number].usage.blocks_copied += copied
    if several:
        _measure_sharing(numbers, found, kv)
    return found


def _measure_sharing(numbers: Ints, groups: list[Group], kv: KVManager) -> None:
    """Measure what groups share that would hold an eighth more blocks than when they were last measured, if they did not."""
    table = kv.table
    seqs = np.flatnonzero(table.alive)
    owners = table.group[seqs]
    place = np.minimum(np.searchsorted(numbers, owners), len(numbers) - 1)
    entries = np.bincount(place, (table.trunk + table.cols)[seqs] * (numbers[place] == owners), len(numbers))
    for group, held in zip(groups, entries.tolist(), strict=True):
        if group.live > 1 and held > group.measured * 9 / 8:
            group.usage.shared_block_ratio, group.measured = kv.group_ratio(group), int(held)


def traced(group: Group) -> Trace:
    """How the outputs of a group came about, up to now."""
    strategy = group.strategy
    name = type(group.request.params).__struct_config__.tag or type(strategy).__name__
    return Trace(str(name).lower(), strategy.trace(), group.usage, strategy.complete)

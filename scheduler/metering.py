"""Counting what each group costs, step by step, with array operations over all groups."""

from __future__ import annotations

import numpy as np

from .accounting import Trace
from .group import Group
from .kv_manager import KVManager, Written
from .planning import Chosen
from .sequences import edges, tally


def count(chosen: Chosen, written: Written, kv: KVManager, groups: dict[int, Group]) -> list[Group]:
    """Add the rows of a step, and the blocks copied for it, to the usage of their groups; who these are."""
    table = kv.table
    owners = table.group[chosen.seqs]
    begins = edges(owners)[:-1]
    tokens = np.add.reduceat(chosen.end - chosen.start, begins).tolist()
    found = {}
    for number, computed in zip(owners[begins].tolist(), tokens, strict=True):
        group = found[number] = groups[number]
        group.usage.forward_tokens += computed
    several = {}
    for number, group in found.items():
        group.flights += 1
        if group.live > 1:
            several[number] = group
    if len(written.src):
        for number, copied in tally(table.group[written.seq[: len(written.src)]]):
            groups[number].usage.blocks_copied += copied
    if several:
        _measure_sharing(several, kv)
    return list(found.values())


def _measure_sharing(groups: dict[int, Group], kv: KVManager) -> None:
    """Measure what groups share that would hold an eighth more blocks than when they were last measured, if they did not."""
    table, numbers = kv.table, np.array(sorted(groups), np.int32)
    seqs = np.flatnonzero(table.alive)
    owners = table.group[seqs]
    place = np.minimum(np.searchsorted(numbers, owners), len(numbers) - 1)
    entries = np.bincount(place, (table.trunk + table.cols)[seqs] * (numbers[place] == owners), len(numbers))
    for number, held in zip(numbers.tolist(), entries.tolist(), strict=True):
        group = groups[number]
        if held > group.measured * 9 / 8:
            group.usage.shared_block_ratio, group.measured = kv.group_ratio(group), int(held)


def traced(group: Group) -> Trace:
    """How the outputs of a group came about, up to now."""
    strategy = group.strategy
    name = type(group.request.params).__struct_config__.tag or type(strategy).__name__
    return Trace(str(name).lower(), strategy.trace(), group.usage, strategy.complete)

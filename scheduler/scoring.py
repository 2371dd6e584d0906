"""Log-probs of a prompt's own tokens, for requests that ask for them.

Every prompt row reads, at each of its positions, the token that follows in the prompt. Positions are scored once: a group
that was preempted computes them again but does not read them again, and a prefix is taken from the cache only as far as
it was scored, since cached blocks hold keys and values but no logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from .group import Group
from .plan import Floats, Ints, Kind, Probe, Reads, ints
from .sequences import Sequences

if TYPE_CHECKING:
    from .planning import Chosen


class Part(NamedTuple):
    """Entries [first, last) of a TARGET probe score the prompt tokens from position `begin` on."""

    group: Group
    begin: int
    first: int
    last: int


class Scored(msgspec.Struct):
    """Prompt tokens begin, begin + 1, ...: the log-prob and rank of each, and the n most probable at its place."""

    begin: int
    logps: list[float]
    ranks: list[int]
    top_ids: Ints  # [tokens, n]
    top_logps: Floats  # [tokens, n]


def targets(chosen: Chosen, offset: Ints, table: Sequences, unscored: dict[int, Group]) -> tuple[Probe | None, list[Part]]:
    """What the rows of these groups shall read. `unscored` loses the groups whose prompts are scored with that."""
    parts: list[Part] = []
    at: list[Ints] = []
    slot: list[Ints] = []
    target: list[Ints] = []
    size = n = 0
    for row in np.flatnonzero(np.isin(table.group[chosen.seqs], list(unscored))).tolist():
        group = unscored.get(int(table.group[chosen.seqs[row]]))
        if group is None:
            continue
        prompt = group.request.prompt
        start, end = int(chosen.start[row]), min(int(chosen.end[row]), len(prompt) - 1)
        begin = max(start, group.scored)
        if begin >= end:
            continue
        at.append(ints(np.arange(begin, end)) - start + offset[row])
        slot.append(np.full(end - begin, table.slot[chosen.seqs[row]], np.int32))
        target.append(prompt[begin + 1 : end + 1])
        parts.append(Part(group, begin + 1, size, size + end - begin))
        size += end - begin
        n = max(n, group.request.prompt_logprobs or 0)
        group.scored = end
        if end == len(prompt) - 1:
            del unscored[group.number]
    if not parts:
        return None, parts
    return Probe(Kind.TARGET, np.concatenate(at), np.concatenate(slot), n, target=np.concatenate(target)), parts


def scored(part: Part, reads: Reads) -> Scored:
    """What one group's entries found."""
    assert reads.logp is not None and reads.rank is not None and reads.top_id is not None and reads.top_logp is not None
    cut, n = slice(part.first, part.last), part.group.request.prompt_logprobs
    return Scored(part.begin, reads.logp[cut].tolist(), reads.rank[cut].tolist(), reads.top_id[cut, :n], reads.top_logp[cut, :n])

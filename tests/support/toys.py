"""Small strategies that use what sampling does not: forks of live sequences, generations, parking, Ask.

They also show that a strategy lives in one file: nothing in the scheduler knows them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from pagefork.scheduler.group import Group
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.plan import Kind, Spec
from pagefork.scheduler.request import Request
from pagefork.scheduler.strategies.base import Ask, Base, Drop, Edit, Emit, Finish, Footprint, Grow, Ids, Read, register
from support.oracle import VOCAB, draw, mix, scores


class BeamToyParams(CommonParams, frozen=True, kw_only=True):
    """The `width` best continuations of max_tokens tokens, no end token, no length penalty."""

    width: int = 3


@register
class BeamToy(Base):
    """Fixed-length beam search: the first child of a beam takes its place, the others fork."""

    params: ClassVar[type[CommonParams]] = BeamToyParams

    def __init__(self, request: Request) -> None:
        assert isinstance(request.params, BeamToyParams)
        self.width = request.params.width
        self.length = request.room
        self.beams: list[tuple[float, list[int]]] = [(0.0, [])]
        self.seqs: list[int] = []

    def footprint(self) -> Footprint:
        return Footprint(self.width, self.width)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        self.seqs = self.seqs or [int(seqs[0])]
        here = set(map(int, seqs))
        ranks = [rank for rank, seq in enumerate(self.seqs) if seq in here]
        bias = np.array([self.beams[rank][0] for rank in ranks], np.float32)
        return [Read(Kind.MERGE, [self.seqs[rank] for rank in ranks], n=self.width, bias=bias)]

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        ranks = {seq: rank for rank, seq in enumerate(self.seqs)}
        assert sorted(map(int, seqs)) == sorted(ranks), "advance must see the whole generation"
        found = zip(reads[0].score, reads[0].parent, reads[0].token, strict=True)
        best = sorted((-score, ranks[int(seqs[parent])], token) for score, parent, token in found if parent >= 0)
        best = best[: self.width]
        beams = [(-score, [*self.beams[rank][1], token]) for score, rank, token in best]
        if len(beams[0][1]) == self.length:
            edits: list[Edit] = [Emit(i, tokens, [0.0] * len(tokens)) for i, (_, tokens) in enumerate(beams)]
            return [*edits, *(Finish(i, "length", score) for i, (score, _) in enumerate(beams)), Drop(self.seqs)]
        taken: set[int] = set()
        src, dst = [], []
        for _, rank, _ in best:
            src.append(self.seqs[rank])
            dst.append(group.fresh(1)[0] if src[-1] in taken else src[-1])
            taken.add(src[-1])
        lost = [seq for seq in self.seqs if seq not in taken]
        self.beams, self.seqs = beams, dst
        return [Grow(src, [token for _, _, token in best], dst), Drop(lost)]


def beam_reference(prompt: list[int], spec: Spec, width: int, length: int) -> list[list[int]]:
    """What BeamToy must return, from the oracle's model alone."""
    beams: list[tuple[np.float32, list[int]]] = [(np.float32(0), [])]
    for _ in range(length):
        candidates = []
        for rank, (score, tokens) in enumerate(beams):
            values = score + scores([*prompt, *tokens], spec).astype(np.float32)
            candidates += [(-values[token], rank, token) for token in range(VOCAB)]
        beams = [(-score, [*beams[rank][1], token]) for score, rank, token in sorted(candidates)[:width]]
    return [tokens for _, tokens in beams]


class LookToyParams(CommonParams, frozen=True, kw_only=True):
    """Each token is the one of `branch` children that an outside value prefers."""

    branch: int = 3


@register
class LookToy(Base):
    """Grows children of a parked sequence, asks for their values, keeps the best, which parks in turn."""

    params: ClassVar[type[CommonParams]] = LookToyParams

    def __init__(self, request: Request) -> None:
        assert isinstance(request.params, LookToyParams)
        self.branch = request.params.branch
        self.length = request.room
        self.node = -1
        self.tokens: list[int] = []
        self.children: dict[int, tuple[int, list[int]]] = {}

    def footprint(self) -> Footprint:
        return Footprint(self.branch)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        return [Read(Kind.TOPN, seqs, n=self.branch)]

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        tops = {int(seq): reads[0].top_id[i].tolist() for i, seq in enumerate(seqs)}
        if self.node < 0:
            self.node = int(seqs[0])
            return self._expand(group, tops[self.node])
        self.children = {seq: (self.children[seq][0], top) for seq, top in tops.items()}
        return [Ask(values, [[*self.tokens, token] for token, _ in self.children.values()], 60.0)]

    def answer(self, group: Group, values: list[float]) -> list[Edit]:
        best = list(self.children)[int(np.argmax(values))]
        token, top = self.children[best]
        self.tokens.append(token)
        lost = [self.node, *(seq for seq in self.children if seq != best)]
        self.node = best
        edits: list[Edit] = [Drop(lost), Emit(0, [token], [0.0])]
        if len(self.tokens) == self.length:
            return [*edits, Finish(0, "length"), Drop([best])]
        return edits + self._expand(group, top)

    def shed(self, group: Group) -> Ids:
        return [self.node] if self.node >= 0 and not group.asked else []

    def _expand(self, group: Group, top: list[int]) -> list[Edit]:
        if len(self.tokens) == self.length - 1:  # children at the limit need no forward
            self.tokens.append(top[0])
            return [Emit(0, top[:1], [0.0]), Finish(0, "length"), Drop([self.node])]
        seqs = group.fresh(len(top))
        self.children = {seq: (token, []) for seq, token in zip(seqs, top, strict=True)}
        return [Grow([self.node] * len(top), top, seqs)]


def value(tokens: list[int]) -> float:
    """The outside value of a child."""
    return mix(7, *tokens) / 2**64


def values(children: list[list[int]]) -> list[float]:
    """The outside values of several children."""
    return [value(tokens) for tokens in children]


def look_reference(prompt: list[int], spec: Spec, branch: int, length: int) -> list[int]:
    """What LookToy must return, from the oracle's model alone."""
    tokens: list[int] = []
    while len(tokens) < length:
        top = np.argsort(-scores([*prompt, *tokens], spec), kind="stable")[:branch].tolist()
        best = top[0] if len(tokens) == length - 1 else top[int(np.argmax([value([*tokens, t]) for t in top]))]
        tokens.append(best)
    return tokens


class RolloutToyParams(CommonParams, frozen=True, kw_only=True):
    """Each token is the one of `branch` whose greedy continuation over `depth` tokens is the most probable."""

    branch: int = 2
    depth: int = 3


@register
class RolloutToy(Base):
    """Throws away one rollout after another from a parked root, so blocks that others filled are written again."""

    params: ClassVar[type[CommonParams]] = RolloutToyParams

    def __init__(self, request: Request) -> None:
        assert isinstance(request.params, RolloutToyParams)
        self.settings = request.params
        self.length = request.room
        self.root = -1
        self.top: list[int] = []
        self.scores: list[float] = []
        self.steps = 0
        self.count = 0

    def footprint(self) -> Footprint:
        return Footprint(1)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        return [Read(Kind.TOPN, seqs, n=self.settings.branch)]

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        seq, ids, logps = int(seqs[0]), reads[0].top_id[0].tolist(), reads[0].top_logp[0].tolist()
        if self.root in (-1, seq):
            self.root, self.top, self.scores = seq, ids, []
            return self._rollout(group)
        self.scores[-1] += logps[0]
        self.steps += 1
        if self.steps < self.settings.depth:
            return [Grow([seq], [ids[0]], [seq])]
        if len(self.scores) < len(self.top):
            return [Drop([seq]), *self._rollout(group)]
        token = self.top[int(np.argmax(self.scores))]
        self.count += 1
        edits: list[Edit] = [Drop([seq]), Emit(0, [token], [0.0])]
        if self.count == self.length:
            return [*edits, Finish(0, "length"), Drop([self.root])]
        return [*edits, Grow([self.root], [token], [self.root])]

    def _rollout(self, group: Group) -> list[Edit]:
        token = self.top[len(self.scores)]
        self.scores.append(0.0)
        self.steps = 0
        return [Grow([self.root], [token], group.fresh(1))]


def rollout_reference(prompt: list[int], spec: Spec, branch: int, depth: int, length: int) -> list[int]:
    """What RolloutToy must return, from the oracle's model alone."""
    tokens: list[int] = []
    for _ in range(length):
        found = []
        for first in np.argsort(-scores([*prompt, *tokens], spec), kind="stable")[:branch].tolist():
            path, score = [*prompt, *tokens, first], 0.0
            for _ in range(depth):
                values = scores(path, spec)
                path.append(int(np.argmax(values)))
                score += float(np.float32(values.max()))
            found.append((score, first))
        tokens.append(found[int(np.argmax([score for score, _ in found]))][1])
    return tokens


class ForkToyParams(CommonParams, frozen=True, kw_only=True):
    """Each token is the largest of `branch` draws."""

    branch: int = 2


@register
class ForkToy(Base):
    """Forks children of a row in the plan of that row, besides another read of it, and goes on from one of them."""

    params: ClassVar[type[CommonParams]] = ForkToyParams

    def __init__(self, request: Request) -> None:
        assert isinstance(request.params, ForkToyParams)
        self.branch, self.length = request.params.branch, request.room
        self.children: Ids = []
        self.tokens: list[int] = []

    def footprint(self) -> Footprint:
        return Footprint(1 + self.branch)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        self.children = group.fresh(self.branch)
        at = [int(seqs[0])] * self.branch
        return [Read(Kind.TOPN, seqs, n=1), Read(Kind.SAMPLE, at, self.children, range(1, 1 + self.branch))]

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        drawn = reads[1].token[reads[1].begin : reads[1].begin + self.branch]
        token = max(drawn)
        self.tokens.append(token)
        if len(self.tokens) == self.length:
            return [Emit(0, [token], [0.0]), Finish(0, "length")]
        child = self.children[drawn.index(token)]
        if len(self.tokens) % 2:  # the leaf and the other children are parked, or dropped
            return [Emit(0, [token], [0.0]), Grow([child], [token], [child])]
        lost = [int(seqs[0]), *(other for other in self.children if other != child)]
        return [Emit(0, [token], [0.0]), Grow([child], [token], [child]), Drop(lost)]


def fork_reference(tokens: list[int], spec: Spec, branch: int, length: int) -> list[int]:
    """What ForkToy must return, from the oracle's model alone."""
    path = list(tokens)
    for _ in range(length):
        path.append(max(draw(path, spec, stream) for stream in range(1, 1 + branch)))
    return path[len(tokens) :]

"""What a beam search remembers: its beams, the pool of finished hypotheses, and their tokens as back-pointers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..plan import Floats, Ints
from .base import Top

_NO_IDS = np.empty(0, np.int32)
_NO_LOGPS = np.empty(0, np.float32)


class Nodes(NamedTuple):
    """Tokens of one depth, N of each: the candidates of a step, best first.

    parent: rank of the beam that the token continues. score: with all tokens before. logp, rank: as they are reported.
    """

    parent: list[int]
    token: list[int]
    score: list[float]
    logp: list[float]
    rank: list[int] | None

    def take(self, which: Sequence[int]) -> Nodes:
        """Some of them."""
        parent, token, score, logp, rank = self
        return Nodes(
            [parent[i] for i in which],
            [token[i] for i in which],
            [score[i] for i in which],
            [logp[i] for i in which],
            None if rank is None else [rank[i] for i in which],
        )

    def head(self, count: int) -> Nodes:
        """The first ones."""
        parent, token, score, logp, rank = self
        return Nodes(parent[:count], token[:count], score[:count], logp[:count], None if rank is None else rank[:count])


# The most probable ids and their log-probs after each beam, [K, n]; None where they were not asked for.
Tops = tuple[Ints, Floats] | None


class Hypothesis(NamedTuple):
    """A finished output: its score, where its last node stands, and which node of the first depth it comes from."""

    score: float
    depth: int
    node: int
    root: int


class Tokens(NamedTuple):
    """Tokens of an output as they are delivered; `tops` is empty where log-probs were not asked for."""

    tokens: list[int]
    logps: list[float]
    tops: list[Top]


class Search:
    """The beams of one group, best first, and what has finished.

    A node (depth, index) is a token of a beam or of a finished hypothesis; depth 0 is the first generated token. Depths that
    all of them share leave the history and become `agreed`; a beam's or hypothesis' `root` is its node at the first depth
    that is not. So memory is the number of steps since then times the width.

    `scores` and `text` (the states of text rules) are those of the beams, `parents` the beams of the step before that they
    continue. Of the last step, `chosen` are the tokens that go on unless the length is reached or the search is over, and
    `ended` the candidates that were offered to the pool.
    """

    def __init__(
        self, width: int, room: int, length_penalty: float, early_stopping: bool | Literal["never"], text: Any = None
    ) -> None:
        self.width = width
        self.begin = 0  # where its beams stand among those of all groups
        self.scores: list[float] = [0.0]
        self.text: list[Any] = [text]
        self.parents: list[int] = []
        self.chosen: list[int] = []
        self.ended: Sequence[int] = ()
        self.agreed = Tokens([], [], [])
        self.pool: list[Hypothesis] = []  # best first; of equal ones the earlier, then the better ranked
        self.done = False
        self._room, self._penalty, self._early = room, length_penalty, early_stopping
        self._base = 0  # the first depth of the history
        self._begins: list[int] = []  # where the nodes of each depth begin in the columns below
        self._parent, self._token, self._logp, self._rank = array("i"), array("i"), array("f"), array("i")
        self._tops: list[Tops] = []  # by depth; this and ranks only where they are reported
        self._roots: list[int] = []

    def step(self, found: Nodes, stopped: list[int], tops: Tops) -> Sequence[int]:
        """Go on with the best candidates that have not stopped; which ones, by index: none when the search is over."""
        count = len(found.token)
        if not count:  # bans and the like left no token after any beam
            self.done, self.scores, self.parents, self.chosen, self.ended, self._roots = True, [], [], [], (), []
            return ()
        length = self._base + len(self._begins) + 1
        run: Sequence[int] = range(min(count, self.width))
        ended: Sequence[int] = ()
        if stopped:
            over = set(stopped)
            run = [i for i in range(count) if i not in over][: self.width]
            ended = [i for i in stopped if i < self.width]
        last = length == self._room
        if last:
            self.chosen = [found.token[i] for i in run]
            ended, run = range(min(count, self.width)), ()
        nodes = found.take([*run, *ended]) if stopped else found.head(self.width)
        live = len(run)
        before = self._roots
        roots = [before[beam] for beam in nodes.parent] if self._begins else list(range(len(nodes.parent)))
        self._remember(nodes, tops)
        if ended:
            self._enter(nodes.score[live:], length, live, roots[live:])
            nodes, roots = nodes.head(live), roots[:live]
        self.parents, self.scores, self.ended, self._roots = nodes.parent, nodes.score, ended, roots
        if not last:
            self.chosen = nodes.token
        if self._over(length):
            self.done, run, self._roots = True, (), []
        self._agree()
        return run

    def _remember(self, nodes: Nodes, tops: Tops) -> None:
        self._begins.append(len(self._parent))
        self._parent.extend(nodes.parent)
        self._token.extend(nodes.token)
        self._logp.extend(nodes.logp)
        if nodes.rank is not None:
            self._rank.extend(nodes.rank)
            self._tops.append(tops)

    def _enter(self, scores: list[float], length: int, index: int, roots: list[int]) -> None:
        """Add to the pool those whose last tokens are the nodes `index`, index + 1, ... of this depth."""
        final = (np.array(scores, np.float32) / length**self._penalty).tolist()
        pool = self.pool + [Hypothesis(score, length - 1, index + i, roots[i]) for i, score in enumerate(final)]
        self.pool = sorted(pool, key=lambda hypothesis: -hypothesis.score)[: self.width]

    def _over(self, length: int) -> bool:
        """Whether nothing runs, or the pool is full and can't, or need not, become better."""
        if not self.scores:
            return True
        if len(self.pool) < self.width:
            return False
        hopeful = self._room if self._early == "never" and self._penalty > 0 else length
        return self._early is True or not np.float32(self.scores[0]) / hopeful**self._penalty > self.pool[-1].score

    def _agree(self) -> None:
        """Move the depths at which beams and pool have one node from the history to `agreed`."""
        pool, live = self.pool, len(self._roots)
        root = self._roots[0] if live else pool[0].root
        if self._roots.count(root) < live:
            return
        for hypothesis in pool:
            if hypothesis.root != root:
                return
        lasts: dict[int, list[int]] = {}  # nodes at which hypotheses end, by their depths in the history
        for hypothesis in pool:
            lasts.setdefault(hypothesis.depth - self._base, []).append(hypothesis.node)
        parent, begins = self._parent, self._begins
        at = len(begins) - 1
        nodes = set(range(live))
        below: list[set[int]] = []  # the nodes of all at each depth, from the last depth on
        while True:  # towards the first depth, where all have the same
            if lasts:
                nodes.update(lasts.pop(at, ()))
            if len(nodes) == 1 and not lasts:
                break
            below.append(nodes)
            begin, at = begins[at], at - 1
            nodes = {parent[begin + node] for node in nodes}
        roots = [dict.fromkeys(nodes, 0)]  # of the nodes at each depth, from this one on
        if below:
            roots.append({node: node for node in below[-1]})
        for begin, here in zip(begins[at + 2 :], below[-2::-1], strict=True):
            above = roots[-1]
            roots.append({node: above[parent[begin + node]] for node in here})
        last = roots[-1]
        self._roots = [last[node] for node in range(live)]
        if pool:
            first = self._base + at
            self.pool = [Hypothesis(score, depth, node, roots[depth - first][node]) for score, depth, node, _ in pool]
        self._settle(at, *nodes)

    def _settle(self, last: int, node: int) -> None:
        """The tokens up to `node` of a depth of the history are those of every output."""
        tokens, logps, tops = self._path(last, node)
        self.agreed.tokens.extend(tokens)
        self.agreed.logps.extend(logps)
        self.agreed.tops.extend(tops)
        end = self._begins[last + 1] if last + 1 < len(self._begins) else len(self._parent)
        del self._parent[:end], self._token[:end], self._logp[:end], self._rank[:end], self._tops[: last + 1]
        self._begins = [begin - end for begin in self._begins[last + 1 :]]
        self._base += last + 1

    def path(self, hypothesis: Hypothesis) -> Tokens:
        """The tokens of one of the pool after those that are `agreed`."""
        return self._path(hypothesis.depth - self._base, hypothesis.node)

    def _path(self, at: int, node: int) -> Tokens:
        """The tokens from the first depth of the history to a node of depth `at` of it."""
        places: list[int] = []
        while at >= 0:
            places.append(self._begins[at] + node)
            node, at = self._parent[places[-1]], at - 1
        places.reverse()
        tops = [self._top(depth, place) for depth, place in enumerate(places)] if self._rank else []
        return Tokens([self._token[place] for place in places], [self._logp[place] for place in places], tops)

    def _top(self, depth: int, place: int) -> Top:
        """What was read for a node of the history."""
        tops, beam = self._tops[depth], self._parent[place]
        ids, logps = (_NO_IDS, _NO_LOGPS) if tops is None else (tops[0][beam], tops[1][beam])
        return Top(self._rank[place], ids, logps)

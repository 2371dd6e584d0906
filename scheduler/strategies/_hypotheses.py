"""What a beam search remembers: its beams, the pool of finished hypotheses, and their tokens as back-pointers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..plan import Bools, Floats, Ints, Longs
from .base import Top

_HYPOTHESIS = np.dtype([("score", np.float32), ("depth", np.int32), ("index", np.int32), ("root", np.int32)])
_NONE: Longs = np.empty(0, np.int64)
_NO_IDS = np.empty(0, np.int32)
_NO_LOGPS = np.empty(0, np.float32)


class Nodes(NamedTuple):
    """Tokens of one depth, [N] each: the candidates of a step, best first, or those of them that are remembered.

    parent: rank of the beam that the token continues. score: with all tokens before. logp, rank: as they are reported.
    """

    parent: Ints
    token: Ints
    score: Floats
    logp: Floats
    rank: Ints | None

    def take(self, which: Longs) -> Nodes:
        """Some of them."""
        rank = None if self.rank is None else self.rank[which]
        return Nodes(self.parent[which], self.token[which], self.score[which], self.logp[which], rank)


# The most probable ids and their log-probs after each beam, [K, n]; None where they were not asked for.
Tops = tuple[Ints, Floats] | None


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

    `scores` and `text` (the states of text rules) are those of the beams. Of the last step, `chosen` are the tokens that go on
    unless the length is reached or the search is over, and `ended` the candidates that were offered to the pool.
    """

    def __init__(
        self, width: int, room: int, length_penalty: float, early_stopping: bool | Literal["never"], text: Any = None
    ) -> None:
        self.width = width
        self.begin = 0  # where its beams stand among those of all groups
        self.scores: Floats = np.zeros(1, np.float32)
        self.text: list[Any] = [text]
        self.chosen: Ints = _NO_IDS
        self.ended = _NONE
        self.agreed = Tokens([], [], [])
        self.pool: NDArray[Any] = np.empty(0, _HYPOTHESIS)  # best first; of equal ones the earlier, then the better ranked
        self.done = False
        self._room, self._penalty, self._early = room, length_penalty, early_stopping
        self._first = np.arange(width)
        self._base = 0  # depth of history[0]
        self._history: list[tuple[Nodes, Tops]] = []
        self._roots: Ints = _NO_IDS

    def step(self, found: Nodes, stopped: Bools, tops: Tops) -> Longs:
        """Go on with the best candidates that have not stopped; which ones, by index: none when the search is over."""
        if not len(stopped):  # bans and the like left no token after any beam
            self.done, self.scores, self.chosen, self.ended, self._roots = True, found.score, found.token, _NONE, _NO_IDS
            return _NONE
        length = self._base + len(self._history) + 1
        ended, run = _NONE, self._first[: len(stopped)]
        if np.count_nonzero(stopped):
            run = (~stopped).nonzero()[0][: self.width]
            ended = stopped[: self.width].nonzero()[0]
        self.chosen = found.token[run]
        if length == self._room:
            ended, run = self._first[: len(stopped)], _NONE
        self.ended = ended
        count = len(run)
        nodes = found.take(np.concatenate((run, ended)) if len(ended) else run)
        roots = self._roots[nodes.parent] if self._history else np.arange(len(nodes.token), dtype=np.int32)
        self._history.append((nodes, tops))
        if len(ended):
            self._enter(nodes.score[count:], length, count, roots[count:])
        self.scores, self._roots = nodes.score[:count], roots[:count]
        if self._over(length):
            self.done, run, self._roots = True, _NONE, _NO_IDS
        self._agree()
        return run

    def _enter(self, scores: Floats, length: int, index: int, roots: Ints) -> None:
        """Add to the pool those whose last tokens are the nodes `index`, index + 1, ... of this depth."""
        new = np.empty(len(scores), _HYPOTHESIS)
        new["score"] = scores / length**self._penalty
        new["depth"] = length - 1
        new["index"] = np.arange(index, index + len(scores))
        new["root"] = roots
        pool = np.concatenate((self.pool, new))
        self.pool = pool[np.argsort(-pool["score"], kind="stable")[: self.width]]

    def _over(self, length: int) -> bool:
        """Whether nothing runs, or the pool is full and can't, or need not, become better."""
        if not len(self.scores):
            return True
        if len(self.pool) < self.width:
            return False
        hopeful = self._room if self._early == "never" and self._penalty > 0 else length
        return self._early is True or not self.scores[0] / hopeful**self._penalty > self.pool["score"][-1]

    def _agree(self) -> None:
        """Move the depths at which beams and pool have one node from the history to `agreed`."""
        live, pool = len(self._roots), self.pool
        roots = self._roots if live else pool["root"]
        if np.count_nonzero(roots != roots[0]) or (len(pool) and np.count_nonzero(pool["root"] != roots[0])):
            return
        order = np.argsort(-pool["depth"], kind="stable") if len(pool) else _NONE
        node: NDArray[Any] = self._first[:live]
        above: NDArray[Any] = _NONE
        at = len(self._history) - 1
        while True:  # towards the first depth, where all have the same
            if len(node) < live + len(pool):
                own = pool[order[len(node) - live :]]
                node = np.concatenate((node, own["index"][own["depth"] == at + self._base]))
            if len(node) == live + len(pool) and not np.count_nonzero(node != node[0]):
                break
            above, node, at = node, self._history[at][0].parent[node], at - 1
        self._roots = above[:live]
        pool["root"][order] = above[live:] if len(above) else 0
        self._settle(at, int(node[0]))

    def _settle(self, last: int, node: int) -> None:
        """The tokens up to `node` of history[last] are those of every output."""
        path = [node]
        for nodes, _ in self._history[last:0:-1]:
            path.append(int(nodes.parent[path[-1]]))
        path.reverse()
        tokens, logps, tops = self.agreed
        for (nodes, _), index in zip(self._history, path, strict=False):
            tokens.append(int(nodes.token[index]))
            logps.append(float(nodes.logp[index]))
        tops += self._tops(path)
        del self._history[: last + 1]
        self._base += last + 1

    def paths(self, hypotheses: NDArray[Any]) -> list[Tokens]:
        """The tokens of some of the pool after those that are `agreed`."""
        counts = hypotheses["depth"] - self._base + 1
        shape = len(hypotheses), int(counts.max())
        index, token, logp = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        node = hypotheses["index"].copy()
        for at in reversed(range(shape[1])):
            nodes = self._history[at][0]
            here = np.flatnonzero(counts > at)
            own = node[here]
            index[here, at], token[here, at], logp[here, at] = own, nodes.token[own], nodes.logp[own]
            node[here] = nodes.parent[own]
        rows = zip(counts.tolist(), token.tolist(), logp.tolist(), index, strict=True)
        return [Tokens(tokens[:count], logps[:count], self._tops(path[:count].tolist())) for count, tokens, logps, path in rows]

    def _tops(self, path: list[int]) -> list[Top]:
        """What was read for the first tokens of the history, given their nodes."""
        found = []
        for (nodes, tops), index in zip(self._history, path, strict=False):
            if nodes.rank is None:
                return []
            parent = nodes.parent[index]
            ids, logps = (_NO_IDS, _NO_LOGPS) if tops is None else (tops[0][parent], tops[1][parent])
            found.append(Top(int(nodes.rank[index]), ids, logps))
        return found

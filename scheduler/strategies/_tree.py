"""The statistics of one search tree: where to look next, what was found, which child to take.

Sequences are only numbers here, and reading, growing and valuing leaves is the strategy's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..search_params import MCTSParams
from .base import Top


class Expansion(NamedTuple):
    """What may follow a node, the most probable first: parallel lists. `prior` adds up to 1; `logp` is the model's.

    `tops` are reported with the tokens, where that is asked for.
    """

    token: list[int]
    prior: list[float]
    logp: list[float]
    tops: list[Top] | None = None


class Node:
    """A generated token, or the prompt, and what became of the simulations through it.

    index: its place in the parent's expansion. length: generated tokens up to and with it; cumulative: the sum of their
    log-probs. pending: simulations through it that are not backed up. own: the value it got as a leaf; value: the mean over
    its visits. seq: the sequence that holds its KV, or -1. ended: (finish reason, stop reason) of a terminal one; text: its
    text state.

    `children` are the first ones of the expansion: among those that no simulation has gone to, all alike but for their
    prior, the most probable is next.
    """

    __slots__ = (
        "children",
        "cumulative",
        "ended",
        "expansion",
        "index",
        "length",
        "own",
        "parent",
        "pending",
        "seq",
        "text",
        "token",
        "total",
        "value",
        "visits",
    )

    def __init__(self, parent: Node | None, index: int, token: int, logp: float) -> None:
        self.parent = parent
        self.index = index
        self.token = token
        self.length: int = 0 if parent is None else parent.length + 1
        self.cumulative: float = 0.0 if parent is None else parent.cumulative + logp
        self.visits = self.pending = 0
        self.total = self.value = self.own = 0.0
        self.seq = -1
        self.ended: tuple[str, int | str | None] | None = None
        self.text: Any = None
        self.expansion: Expansion | None = None
        self.children: list[Node] = []

    def child(self, index: int) -> Node:
        """The child at a place of the expansion, which is at most one beyond those that exist."""
        if index == len(self.children):
            assert self.expansion is not None
            self.children.append(Node(self, index, self.expansion.token[index], self.expansion.logp[index]))
        return self.children[index]

    def tokens(self) -> list[int]:
        """The generated tokens up to it."""
        found: list[int] = []
        node = self
        while node.parent is not None:
            found.append(node.token)
            node = node.parent
        found.reverse()
        return found

    def below(self) -> Iterator[Node]:
        """It and all its descendants, parents first."""
        found = [self]
        for node in found:
            found += node.children
        yield from found


class Tree:
    """One search tree. Its root moves down with the tokens that are chosen; the path to it stays, for their sake.

    left: simulations before the next token; done: those since the start. wave: leaves that are selected and not backed up.
    """

    def __init__(self, params: MCTSParams, output: int) -> None:
        self.output = output
        self.root = Node(None, -1, -1, 0.0)
        self.left = params.num_simulations
        self.done = 0
        self.wave: list[Node] = []
        self._params = params
        self._select = self._ucb1 if params.selection == "ucb1" else self._puct
        self._from_parent = params.fpu == "parent"

    def select(self) -> None:
        """Make a wave of at most leaf_batch_size simulations; it ends early when one would go to a leaf that is in it.

        A leaf is a node without visits; one that was visited comes again if it is terminal, or max_depth below the root, or
        nothing can follow it.
        """
        for _ in range(min(self._params.leaf_batch_size, self.left)):
            leaf = self._descend()
            if leaf.pending and not leaf.visits:
                break
            for node in self._path(leaf):
                node.pending += 1
            self.wave.append(leaf)

    def _path(self, node: Node) -> Iterator[Node]:
        """From a node up to the root."""
        while node is not self.root:
            yield node
            assert node.parent is not None
            node = node.parent
        yield node

    def _descend(self) -> Node:
        node, limit = self.root, self.root.length + self._params.max_depth
        while node.visits and node.ended is None and node.length < limit:
            assert node.expansion is not None
            if not node.expansion.token:
                break
            node = node.child(self._select(node))
        return node

    def _puct(self, node: Node) -> int:
        """argmax over a of Q(a) + c_puct P(a) sqrt(N(node)) / (1 + N(a) + O(a)).

        N are visits, O pending simulations. Q is the mean value; without visits that of `node`, or 0 (`fpu`). Ties go to the
        higher prior, then to the lower index.
        """
        assert node.expansion is not None
        prior, children = node.expansion.prior, node.children
        scale = self._params.c_puct * math.sqrt(node.visits)
        unvisited = node.value if self._from_parent else 0.0
        best, most = 0, -math.inf
        for index, child in enumerate(children):
            visits = child.visits
            score = (child.value if visits else unvisited) + scale * prior[index] / (1 + visits + child.pending)
            if score > most:
                best, most = index, score
        index = len(children)
        return index if index < len(prior) and unvisited + scale * prior[index] > most else best

    def _ucb1(self, node: Node) -> int:
        """argmax over a of Q(a) + c_puct sqrt(ln N(node) / (N(a) + O(a))); first those with N(a) + O(a) = 0, by prior."""
        assert node.expansion is not None
        if len(node.children) < len(node.expansion.token):
            return len(node.children)
        log, scale = math.log(node.visits), self._params.c_puct
        unvisited = node.value if self._from_parent else 0.0
        best, most = 0, -math.inf
        for index, child in enumerate(node.children):
            visits = child.visits
            score = (child.value if visits else unvisited) + scale * math.sqrt(log / (visits + child.pending))
            if score > most:
                best, most = index, score
        return best

    def back_up(self) -> None:
        """Count the simulations of the wave, in the order of their selection, with what their leaves are worth."""
        for leaf in self.wave:
            for node in self._path(leaf):
                node.pending -= 1
                node.visits += 1
                node.total += leaf.own
                node.value = node.total / node.visits
        self._count(len(self.wave))
        self.wave = []

    def _count(self, simulations: int) -> None:
        self.left -= simulations
        self.done += simulations

    def best(self) -> Node:
        """The child with the most visits; ties go to the higher value, then to the higher prior."""
        children = self.root.children or [self.root.child(0)]
        return max(children, key=lambda child: (child.visits, child.value, -child.index))

    def draw(self, seed: int) -> Node:
        """A child with chances proportional to visits ** (1 / visit_temperature); without any visit the most probable one.

        What is drawn is a function of the visits, the seed, the output and the position.
        """
        children = self.root.children
        if not children:
            return self.best()
        most = max(child.visits for child in children)
        power = 1 / self._params.visit_temperature
        edges = np.cumsum([(child.visits / most) ** power for child in children])
        key = np.random.SeedSequence((seed, self.output, self.root.length))
        at = np.random.Generator(np.random.PCG64(key)).random() * edges[-1]
        return children[min(int(np.searchsorted(edges, at, side="right")), len(children) - 1)]

    def move(self, child: Node) -> list[int]:
        """Make a child of the root the root, and begin the simulations for the next token; the sequences that end.

        With reuse_tree its statistics stay. Else it is as after its expansion, which then counts as the first simulation. The
        sequence of the old root ends too, and is still there to be grown into that of a child that was not visited.
        """
        old, self.root = self.root, child
        self.left = self._params.num_simulations
        old.children.remove(child)
        seq, ended = old.seq, _cut(old)
        old.seq, old.expansion = seq, None
        if child.visits and not self._params.reuse_tree and child.ended is None:
            seq, child.seq = child.seq, -1
            ended += _cut(child)
            child.seq = seq
            child.visits, child.total, child.value = 1, child.own, child.own
            self._count(1)
        return ended

    def entries(self) -> Iterator[tuple[int, int, float, int, float]]:
        """The root, its possible children and all visited nodes below: (entry of the parent, token, prior, visits, value)."""
        yield -1, -1, 1.0, self.root.visits, self.root.value
        count, parents = 1, [(0, self.root)]
        for entry, node in parents:
            if node.expansion is None:
                continue
            listed = len(node.expansion.token) if node is self.root else len(node.children)
            for index, (token, prior) in enumerate(zip(node.expansion.token[:listed], node.expansion.prior, strict=False)):
                if index < len(node.children):
                    child = node.children[index]
                    parents.append((count, child))
                    yield entry, token, prior, child.visits, child.value
                else:
                    yield entry, token, prior, 0, 0.0
                count += 1


def _cut(root: Node) -> list[int]:
    """Take away the descendants of a node; the sequences that they and itself had."""
    gone = list(root.below())
    ended = [node.seq for node in gone if node.seq >= 0]
    for node in gone:
        node.seq, node.children = -1, []
    return ended

"""A group: the sequences of one request, which share cache blocks."""

from __future__ import annotations

import itertools
from array import array
from enum import Enum
from typing import Any

import numpy as np

from .accounting import Usage
from .plan import Ints, ints
from .request import Request
from .sequences import Sequences
from .strategies.base import Ids, Strategy

_SHORT = 32  # fewer tokens at once are appended one by one: arrays of few elements are slow


class State(Enum):
    """Where a group is: in the queue, in the cache, or over."""

    WAITING = 0
    RUNNING = 1
    ENDED = 2


class TokenTree:
    """Generated tokens as back-pointers (parent, token): a fork costs nothing, whatever its length."""

    def __init__(self) -> None:
        self._parent = array("i")
        self._token = array("i")

    def extend(self, parents: Ints, tokens: Ints) -> Ints:
        """The nodes of tokens after `parents` (-1: the prompt)."""
        first = len(self._token)
        self._parent.frombytes(parents.astype(np.int32).tobytes())
        self._token.frombytes(tokens.astype(np.int32).tobytes())
        return np.arange(first, len(self._token), dtype=np.int32)

    def path(self, node: int, count: int) -> array[int]:
        """The last `count` tokens up to `node`, in order."""
        parent, token, tokens = self._parent, self._token, array("i")
        for _ in range(count):
            tokens.append(token[node])
            node = parent[node]
        tokens.reverse()
        return tokens

    def common(self, nodes: Ints, depths: Ints) -> int:
        """How many leading tokens all the nodes share, `depths` being the number of tokens up to each."""
        parent = np.frombuffer(self._parent, np.int32)
        shortest = depth = int(depths.min())
        while len(deeper := np.flatnonzero(depths > shortest)):
            nodes, depths = nodes.copy(), depths.copy()
            nodes[deeper] = parent[nodes[deeper]]
            depths[deeper] -= 1
        nodes = np.unique(nodes)
        while len(nodes) > 1:
            nodes = np.unique(parent[nodes])
            depth -= 1
        return depth

    def parents(self, nodes: Ints) -> Ints:
        """The nodes one token earlier; -1, the prompt, stays."""
        return np.where(nodes < 0, -1, np.frombuffer(self._parent, np.int32)[nodes]) if len(self._parent) else nodes.copy()

    def up(self, node: int, count: int) -> int:
        """The node `count` tokens earlier."""
        for _ in range(count):
            node = self._parent[node]
        return node


def append_each(trees: list[TokenTree], counts: list[int], parents: Ints, tokens: Ints) -> Ints:
    """Tokens for each of many trees, as many as the counts say, after a parent each; the nodes."""
    if max(counts) > _SHORT:
        edges = np.cumsum([0, *counts]).tolist()
        spans = itertools.pairwise(edges)
        return np.concatenate([tree.extend(parents[b:e], tokens[b:e]) for tree, (b, e) in zip(trees, spans, strict=True)])
    before, new, nodes = parents.tolist(), tokens.tolist(), []
    at = 0
    for tree, count in zip(trees, counts, strict=True):
        first = len(tree._token)
        if count == 1:
            nodes.append(first)
            tree._parent.append(before[at])
            tree._token.append(new[at])
        else:
            nodes += range(first, first + count)
            tree._parent.extend(before[at : at + count])
            tree._token.extend(new[at : at + count])
        at += count
    return ints(nodes)


class Group:
    """One request's sequences, its strategy, and the blocks that all of them share (`trunk`, one reference each).

    `expect`: rows whose read-out of this generation is outstanding. `asked`: an Ask is out.
    `flights`: plans in flight that hold rows of the group. `scored`: prompt positions at which the next token's log-prob
    was read, in requests that ask for it; else all of them. `measured`: table entries of its sequences when the part that
    they share was measured last. `needed`: blocks that its running sequences held when it was preempted.
    """

    def __init__(self, number: int, request: Request, strategy: Strategy, sequences: Sequences) -> None:
        self.number = number
        self.request = request
        self.strategy = strategy
        self.state = State.WAITING
        self.order = (request.priority, request.arrival)
        self.width, self.outputs = strategy.footprint()
        self.unfinished = set(range(self.outputs))
        self.trunk: list[int] = []
        self.tokens = TokenTree()
        self.text: dict[int, Any] = {}
        self.live = 0
        self.expect = 0
        self.asked = False
        self.flights = 0
        self.scored = 0 if request.prompt_logprobs is not None else len(request.prompt) - 1
        self.held: list[tuple[Ids, list[Any], list[int]]] = []  # reads of a generation that is not complete yet
        self.bypassed = 0
        self.preemptions = 0
        self.cached_tokens = 0
        self.usage = Usage()
        self.measured = 0
        self.needed = 0
        self.common: int | None = None  # leading tokens that all its sequences share, while it waits
        self._sequences = sequences

    def fresh(self, count: int) -> list[int]:
        """Ids for `count` new sequences, to be the dst of a Grow or the seqs of a Read."""
        self.live += count
        return self._sequences.allocate(count, self.number)

    def root(self) -> int:
        """The first sequence, which knows the prompt."""
        table, prompt = self._sequences, self.request.prompt
        (root,) = self.fresh(1)
        table.known[root] = len(prompt)
        table.last[root] = prompt[-1]
        table.limit[root] = self.request.limit
        table.run[root] = True
        table.pipelined[root] = self.strategy.pipelined
        self.expect = 1
        return root

    @property
    def is_scored(self) -> bool:
        """Whether nothing of the prompt is left to be scored."""
        return self.scored == len(self.request.prompt) - 1

    def prefix(self, length: int) -> Ints:
        """The first `length` tokens, which all sequences share."""
        if length <= len(self.request.prompt):
            return self.request.prompt[:length]
        return self.history(int(self._sequences.of(self.number)[0]), 0, length)

    def history(self, seq: int, begin: int = 0, end: int | None = None) -> Ints:
        """Tokens [begin, end) of a sequence, prompt included."""
        end = int(self._sequences.known[seq]) if end is None else end
        return np.frombuffer(self.token_bytes(seq, begin, end), np.int32)

    def token_bytes(self, seq: int, begin: int, end: int) -> bytes:
        """The same tokens as bytes of int32."""
        prompt = self.request.prompt
        head = prompt[begin:end].tobytes()
        if end <= len(prompt):
            return head
        node = self.tokens.up(int(self._sequences.node[seq]), int(self._sequences.known[seq]) - end)
        return head + self.tokens.path(node, end - max(begin, len(prompt))).tobytes()

    def common_length(self, seqs: Ints) -> int:
        """How many leading tokens the given sequences share."""
        table, prompt = self._sequences, len(self.request.prompt)
        known = table.known[seqs]
        if known.min() <= prompt:
            return int(known.min())
        return prompt + self.tokens.common(table.node[seqs], known - prompt)

"""A group: the sequences of one request, which share cache blocks."""

from __future__ import annotations

from array import array
from enum import Enum
from typing import Any

import numpy as np

from .plan import Ints
from .request import Request
from .sequences import Sequences
from .strategies.base import Ids, Strategy


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

    def common(self, nodes: list[int], depth: int) -> int:
        """How many leading tokens all the nodes share, `depth` being the number of tokens up to each."""
        while len(set(nodes)) > 1:
            nodes = [self._parent[node] for node in nodes]
            depth -= 1
        return depth

    def up(self, node: int, count: int) -> int:
        """The node `count` tokens earlier."""
        for _ in range(count):
            node = self._parent[node]
        return node


def append_each(trees: list[TokenTree], parents: list[int], tokens: list[int]) -> list[int]:
    """One token for each of many trees, after one parent each; the nodes."""
    nodes = []
    for tree, parent, token in zip(trees, parents, tokens, strict=True):
        nodes.append(len(tree._token))
        tree._parent.append(parent)
        tree._token.append(token)
    return nodes


class Group:
    """One request's sequences, its strategy, and the blocks that all of them share (`trunk`, one reference each).

    `expect`: rows whose read-out of this generation is outstanding. `asked`: an Ask is out.
    `flights`: plans in flight that hold rows of the group. `scored`: prompt positions at which the next token's log-prob
    was read, in requests that ask for it; else all of them.
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
        self.held: list[tuple[Ids, list[Any]]] = []  # reads of a generation that is not complete yet
        self.bypassed = 0
        self.preemptions = 0
        self.cached_tokens = 0
        self._sequences = sequences

    def fresh(self, count: int) -> list[int]:
        """Ids for `count` new sequences, to be the dst of a Grow or the seqs of a Read."""
        ids = self._sequences.allocate(count)
        self._sequences.group[ids] = self.number
        self.live += count
        return ids

    def root(self) -> int:
        """The first sequence, which knows the prompt."""
        table, prompt = self._sequences, self.request.prompt
        root = self.fresh(1)[0]
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
        table = self._sequences
        shortest = int(table.known[seqs].min())
        prompt = len(self.request.prompt)
        nodes = [self.tokens.up(int(table.node[s]), int(table.known[s]) - shortest) for s in seqs]
        return prompt + self.tokens.common(nodes, shortest - prompt)

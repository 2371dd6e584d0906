"""The outputs of a request that has the oracle's model to itself: searches by their references, which know no sequences."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import inf, log, sqrt
from typing import Any

import numpy as np

from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.plan import Spec
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams
from support import contrastive
from support.beam_reference import beam_search
from support.mcts_reference import Path, Search
from support.oracle import scores
from support.toys import value


def hashed(leaves: Sequence[Any]) -> list[float]:
    """A value of every leaf that nothing but its tokens decides."""
    return [value(leaf.token_ids) for leaf in leaves]


class Waves(Search):
    """The search in waves of up to leaf_batch_size simulations, which are selected before any of them is backed up."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pending: Counter[Path] = Counter()

    def select(self, path: Path) -> Path:
        """What waits to be backed up makes a child less attractive: it counts as visits do, but for the mean."""
        exploration, n, mean = self.params.c_puct, self.visits[path], self.mean(path)
        ranked = []
        for index, (token, prior, _) in enumerate(self.children(path)):
            child = (*path, token)
            q = self.mean(child) if self.visits[child] else mean if self.params.fpu == "parent" else 0.0
            taken = self.visits[child] + self.pending[child]
            if self.params.selection == "puct":
                score = q + exploration * prior * sqrt(n) / (1 + taken)
            else:
                score = q + exploration * sqrt(log(n) / taken) if taken else inf
            ranked.append((score, prior, -index, child))
        return max(ranked)[-1]

    def leaf(self) -> Path:
        path = self.root
        while self.visits[path] and self.reason(path) is None and len(path) - len(self.root) < self.params.max_depth:
            path = self.select(path)
        return path

    def wave(self, most: int) -> int:
        """Make one wave; its simulations."""
        leaves: list[Path] = []
        while len(leaves) < min(most, self.params.leaf_batch_size):
            leaf = self.leaf()
            if leaf in leaves and not self.visits[leaf]:
                break
            leaves.append(leaf)
            self.pending.update(leaf[:end] for end in range(len(self.root), len(leaf) + 1))
        for leaf in leaves:
            if not self.visits[leaf]:
                self.own[leaf] = self.evaluate(leaf)
            for end in range(len(self.root), len(leaf) + 1):
                self.visits[leaf[:end]] += 1
                self.total[leaf[:end]] += self.own[leaf]
            self.simulations += 1
        self.pending.clear()
        return len(leaves)

    def run(self) -> list[int]:
        """The tokens of the output."""
        left = self.params.num_simulations
        while self.reason(self.root) is None:
            while left:
                left -= self.wave(left)
            left = self.params.num_simulations
            self.root = (*self.root, self.choose().token)
            if not self.params.reuse_tree and self.visits[self.root]:
                own = self.own[self.root]
                self.visits, self.total, self.own = (
                    Counter({self.root: 1}),
                    defaultdict(float, {self.root: own}),
                    {self.root: own},
                )
                self.simulations += 1
                left -= 1
        return list(self.root)


def outputs_alone(prompt: list[int], spec: Spec, params: CommonParams, stops: frozenset[int]) -> list[list[int]] | None:
    """What a search must deliver; None for what is no search."""
    match params:
        case BeamSearchParams():
            found = beam_search(lambda tokens: scores([*prompt, *tokens], spec).astype(np.float32), params, stops)
            return [found[min(index, len(found) - 1)].tokens for index in range(params.n)]
        case ContrastiveSearchParams():
            return [[chosen.token for chosen in contrastive.reference(prompt, spec, params, stops)]]
        case MCTSParams():
            outside = None if params.value_fn is None else lambda tokens, cumulative, reason: value(tokens)
            return [Waves(prompt, spec, params, stops, output, outside).run() for output in range(params.n)]
        case _:
            return None

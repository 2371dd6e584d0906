"""Monte Carlo tree search of the oracle's model, one simulation after another: recursion over token paths, dicts, no tree.

Written from the definition: it shares nothing with the strategy but the random numbers.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pagefork.scheduler.plan import Spec
from pagefork.scheduler.request import TextRules
from pagefork.scheduler.search_params import MCTSParams
from support.oracle import draw, scores

Path = tuple[int, ...]
Value = Callable[[list[int], float, str | None], float]  # of generated tokens, their cumulative log-prob, finish reason


class Child(NamedTuple):
    token: int
    prior: float
    logp: float


class Search:
    """The search for one output.

    By emitted token, `trees`: the visits of all nodes below the root, by path from the root; `values`: the mean values of the
    root and its children.
    """

    def __init__(
        self,
        prompt: list[int],
        spec: Spec,
        params: MCTSParams,
        stops: frozenset[int] = frozenset(),
        output: int = 0,
        value: Value | None = None,
        rules: TextRules | None = None,
    ) -> None:
        self.prompt, self.spec, self.params, self.stops = prompt, spec, params, stops
        self.output, self.value, self.rules = output, value, rules
        self.visits: Counter[Path] = Counter()
        self.total: defaultdict[Path, float] = defaultdict(float)
        self.own: dict[Path, float] = {}
        self.simulations = 0
        self.root: Path = ()
        self._children: dict[Path, list[Child]] = {}
        self.logps: list[float] = []
        self.trees: list[dict[Path, int]] = []
        self.values: list[list[float]] = []

    def children(self, path: Path) -> list[Child]:
        if path not in self._children:
            values = scores([*self.prompt, *path], self.spec).astype(np.float32)
            best = np.argsort(-values, kind="stable")[: self.params.top_k].tolist()
            chances = [float(np.exp(values[token])) for token in best]
            found = [Child(token, p / sum(chances), float(values[token])) for token, p in zip(best, chances, strict=True)]
            self._children[path] = found
        return self._children[path]

    def reason(self, path: Sequence[int]) -> str | None:
        """Why an output ends with a path, if it does."""
        if path and path[-1] in self.stops:
            return "stop"
        if self.rules is not None and path:
            state, hit = self.rules.start(), None
            for token in path:
                state, hit = self.rules.check(state, token)
            if hit is not None and len(path) >= self.params.min_tokens:
                return "stop"
        return "length" if len(path) == self.params.max_tokens else None

    def mean(self, path: Path) -> float:
        return self.total[path] / self.visits[path]

    def select(self, path: Path) -> Path:
        unvisited = self.mean(path) if self.params.fpu == "parent" else 0.0
        ranked = []
        for index, (token, prior, _) in enumerate(self.children(path)):
            child = (*path, token)
            n = self.visits[child]
            q = self.mean(child) if n else unvisited
            if self.params.selection == "puct":
                score = q + self.params.c_puct * prior * math.sqrt(self.visits[path]) / (1 + n)
            else:
                score = q + self.params.c_puct * math.sqrt(math.log(self.visits[path]) / n) if n else math.inf
            ranked.append((score, prior, -index, child))
        return max(ranked)[-1]

    def evaluate(self, path: Path) -> float:
        """The value of a leaf, after its rollout."""
        tokens = list(path)
        stream = (self.output << 32) + self.simulations
        while self.reason(tokens) is None and len(tokens) - len(path) < self.params.rollout_tokens:
            tokens.append(draw([*self.prompt, *tokens], self.spec, stream))
        cumulative = sum(
            float(np.float32(scores([*self.prompt, *tokens[:i]], self.spec)[token])) for i, token in enumerate(tokens)
        )
        if self.value is not None:
            return self.value(tokens, cumulative, self.reason(tokens))
        return math.exp(cumulative / len(tokens)) if tokens else 1.0

    def simulate(self, path: Path) -> float:
        if path not in self.own:
            value = self.own[path] = self.evaluate(path)
        elif self.reason(path) is not None or len(path) - len(self.root) == self.params.max_depth:
            value = self.own[path]
        else:
            value = self.simulate(self.select(path))
        self.visits[path] += 1
        self.total[path] += value
        return value

    def choose(self) -> Child:
        children = self.children(self.root)
        counts = [self.visits[(*self.root, child.token)] for child in children]
        if not any(counts):
            return children[0]
        if self.params.visit_temperature:
            weights = np.cumsum([(n / max(counts)) ** (1 / self.params.visit_temperature) for n in counts])
            key = np.random.SeedSequence((self.spec.seed, self.output, len(self.root)))
            return children[
                int(np.searchsorted(weights, np.random.Generator(np.random.PCG64(key)).random() * weights[-1], "right"))
            ]
        ranked = [
            (n, self.mean((*self.root, child.token)) if n else 0.0, child.prior, -i)
            for i, (n, child) in enumerate(zip(counts, children, strict=True))
        ]
        return children[-max(ranked)[-1]]

    def run(self) -> list[int]:
        """The tokens of the output."""
        left = self.params.num_simulations
        while self.reason(self.root) is None:
            for _ in range(left):
                self.simulate(self.root)
                self.simulations += 1
            self.trees.append({p[len(self.root) :]: n for p, n in self.visits.items() if n and p[: len(self.root)] == self.root})
            paths = [self.root, *((*self.root, child.token) for child in self.children(self.root))]
            self.values.append([self.mean(path) if self.visits[path] else 0.0 for path in paths])
            chosen = self.choose()
            self.logps.append(chosen.logp)
            self.root = (*self.root, chosen.token)
            left = self.params.num_simulations
            if not self.params.reuse_tree:
                kept = self.own.get(self.root)
                self.visits.clear()
                self.total.clear()
                self.own.clear()
                if kept is not None:
                    self.own[self.root] = self.total[self.root] = kept
                    self.visits[self.root] = 1
                    self.simulations += 1
                    left -= 1
        return list(self.root)


def outputs(prompt: list[int], spec: Spec, params: MCTSParams, **options: Any) -> list[Search]:
    """The finished searches of all outputs."""
    searches = [Search(prompt, spec, params, output=output, **options) for output in range(params.n)]
    for search in searches:
        search.run()
    return searches

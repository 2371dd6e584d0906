"""Monte Carlo tree search over tokens: PUCT (Rosin 2011; Silver et al. 2017) or UCB1 (Kocsis & Szepesvari 2006).

A node of the tree owns one KV position. What it has above that it shares with its parent, so that a leaf costs one row; all
nodes but the leaves being computed are parked. The trees of all outputs go through their waves together: select leaves,
compute them, roll them out, value them, back up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import msgspec
import numpy as np

from ..errors import NoTokenError
from ..group import Group
from ..params import CommonParams
from ..plan import Kind, ints
from ..request import Request, TextRules
from ..search_params import MCTSParams
from ._tree import Expansion, Node, Tree
from .base import Ask, Base, Drop, Edit, Emit, Finish, Footprint, Grow, Ids, Read, Samples, Top, ending, register

_TRACED = 10_000  # entries of a trace
_A_STEP = 60.0  # seconds, far more than it takes to come back from an Ask of nothing
_AT_ONCE = 10_000  # children looked at, about, in simulations that need no row, before others get their turn
_NO_TABLE = np.empty(0, np.int32), np.empty(0, np.float32)


class Leaf(msgspec.Struct):
    """What `value_fn` sees of a leaf: the prompt, and what was generated up to the leaf and, with rollouts, after it.

    cumulative_logprob: the sum of the model's log-probs of token_ids. finish_reason: "stop" or "length" where they are
    complete, else None.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    cumulative_logprob: float
    finish_reason: str | None
    text: str = ""


class MCTSStep(msgspec.Struct, tag="mcts"):
    """The tree when a token of output `output` was chosen: its root (entry 0), the root's children and all visited nodes.

    Parallel lists: parent (an entry, -1 for the root), token (-1 for the root), prior, visits, value (the mean; 0 without
    visits). `chosen` is the entry of the token.
    """

    output: int
    parent: list[int]
    token: list[int]
    prior: list[float]
    visits: list[int]
    value: list[float]
    chosen: int


@register
class MCTS(Base):
    """One tree per output. Waves depend on nothing but the tree, so that neighbours and budgets can't change it.

    A wave begins with a forward of its new leaves, which reads their children off too. Rollouts are forked from the leaves
    and dropped. Without rollouts or value_fn those phases are left out; waves that need no forward and no value from outside
    are done at once.
    """

    params: ClassVar[type[CommonParams]] = MCTSParams

    def __init__(self, request: Request) -> None:
        assert isinstance(request.params, MCTSParams)
        self._request = request
        self._params = request.params
        vocab_size = request.extra.get("vocab_size")
        self._top_k = min(self._params.top_k, vocab_size or self._params.top_k)
        self._with_tops = self._params.logprobs is not None
        self._top_n = self._params.logprobs or 0
        if vocab_size is not None and not 0 <= self._top_n <= vocab_size:
            self._top_n = vocab_size
        self._trees: list[Tree] = []  # those that go on
        self._leaves: list[Node] = []  # of the wave, of all trees, without those that were visited before
        self._streams: list[int] = []  # one for each of them: output and number of the simulation
        self._tips: list[Node] = []  # where their rollouts are
        self._flying: dict[int, int] = {}  # sequences whose rows are out: the leaf that they compute or roll out
        self._rolling = False
        self._prompt: list[int] = []
        self._trace: list[MCTSStep] = []
        self._traced = 0
        self.complete = True

    def footprint(self) -> Footprint:
        """A wave of leaves per output."""
        return Footprint(self._params.width, self._params.n)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        """The children of each leaf, and the first token of its rollout; of rollouts the next token."""
        if self._rolling:
            return [Read(Kind.SAMPLE, seqs)]
        forks: Ids | None = None
        streams: Ids | None = None
        if not self._leaves:
            self._plant(group, int(seqs[0]))
            if len(self._leaves) > 1:
                seqs, forks, streams = [int(seqs[0])] * len(self._leaves), list(self._flying), self._streams
        reads = [Read(Kind.TOPN, seqs, forks, streams, self._top_k, processed=True)]
        if self._top_n:
            reads.append(Read(Kind.TOPN, seqs, forks, streams, self._top_n))
        if self._params.rollout_tokens:
            reads.append(Read(Kind.SAMPLE, seqs, forks, streams))
        return reads

    def _plant(self, group: Group, seq: int) -> None:
        """A tree for each output, rooted in the prompt."""
        self._prompt = self._request.prompt.tolist()
        self._trees = [Tree(self._params, output) for output in range(self._params.n)]
        rules = self._request.rules
        for tree, root_seq in zip(self._trees, [seq, *group.fresh(self._params.n - 1)], strict=True):
            tree.root.seq = root_seq
            tree.root.text = rules.start() if rules is not None else None
            tree.select()
            self._enlist(tree, tree.wave)
        self._flying = {leaf.seq: at for at, leaf in enumerate(self._leaves)}

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        """Expand the leaves that were read; roll on; when all is rolled out, value the leaves."""
        at = [self._flying[seq] for seq in ints(seqs).tolist()]
        if not self._rolling:
            self._expand(at, reads)
        edits = self._roll(group, ints(seqs).tolist(), at, reads[-1]) if self._params.rollout_tokens else []
        if self._rolling:
            return edits
        self._flying = {}
        return edits + self._value(group)

    def answer(self, group: Group, values: list[float]) -> list[Edit]:
        """Back up what value_fn said."""
        for leaf, value in zip(self._leaves, values, strict=True):
            leaf.own = float(value)
        return self._back_up(group)

    def shed(self, group: Group) -> Ids:
        """Nodes whose children hold no sequence first; among equals the least visited. Their statistics stay."""
        parked = [
            (any(child.seq >= 0 for child in node.children), node.visits, node.seq)
            for tree in self._trees
            for node in tree.root.below()
            if node.seq >= 0 and node.seq not in self._flying
        ]
        return [seq for *_, seq in sorted(parked)]

    def trace(self) -> list[Any]:
        """The tree at each emitted token, as far as the trace has room."""
        return list(self._trace)

    def _expand(self, at: list[int], reads: list[Any]) -> None:
        """Keep the children of each leaf; their priors add up to 1."""
        top = reads[0]
        columns = top.top_id.tolist(), top.top_p.tolist(), top.top_logp.tolist()
        for i, (index, ids, chances, logps) in enumerate(zip(at, *columns, strict=True)):
            count = len(ids)
            while count and not (ids[count - 1] >= 0 and chances[count - 1] > 0):
                count -= 1
            total = sum(chances[:count])
            prior = [chance / total for chance in chances[:count]]
            tops = None
            if self._with_tops:
                table = (reads[1].top_id[i], reads[1].top_logp[i]) if self._top_n else _NO_TABLE
                tops = [Top(rank, *table) for rank in top.top_rank[i, :count].tolist()]
            self._leaves[index].expansion = Expansion(ids[:count], prior, logps[:count], tops)

    def _roll(self, group: Group, seqs: list[int], at: list[int], drawn: Samples) -> list[Edit]:
        """Each rollout gets the token that was drawn; those that are not over compute it, in a fork of the leaf at first."""
        src: list[int] = []
        token: list[int] = []
        indices: list[int] = []
        over: list[int] = []
        for i, (seq, index) in enumerate(zip(seqs, at, strict=True), drawn.begin):
            tip = self._tips[index] = Node(self._tips[index], -1, drawn.token[i], drawn.logp[i])
            self._settle(tip)
            if tip.ended is None and tip.length - self._leaves[index].length < self._params.rollout_tokens:
                src.append(seq)
                token.append(drawn.token[i])
                indices.append(index)
            elif self._rolling:
                over.append(seq)
        dst = src if self._rolling else group.fresh(len(src))
        self._flying = dict(zip(dst, indices, strict=True))
        self._rolling = bool(src)
        edits: list[Edit] = [Drop(over)] if over else []
        return [*edits, Grow(src, token, dst)] if src else edits

    def _settle(self, node: Node) -> None:
        """Whether a new node is terminal, and its text state."""
        assert node.parent is not None
        hit = None
        if self._request.rules is not None:
            node.text, hit = self._request.rules.check(node.parent.text, node.token)
        node.ended = ending(self._request, node.token, node.length, hit)

    def _value(self, group: Group) -> list[Edit]:
        """Ask what the leaves are worth, those of all trees at once, or say so."""
        value_fn = self._params.value_fn
        if value_fn is not None and not isinstance(value_fn, str):  # a name has become a function before
            asked = [Leaf(self._prompt, tip.tokens(), tip.cumulative, tip.ended[0] if tip.ended else None) for tip in self._tips]
            stops = [tip.ended[1] if tip.ended else None for tip in self._tips]
            call = partial(_valued, value_fn, self._request.rules, stops)
            return [Ask(call, asked, self._params.value_timeout)]
        for leaf, tip in zip(self._leaves, self._tips, strict=True):
            leaf.own = _default(tip)
        return self._back_up(group)

    def _back_up(self, group: Group) -> list[Edit]:
        """End the wave, emit what is decided, and begin the next one."""
        self._leaves, self._streams, self._tips = [], [], []
        edits: list[Edit] = []
        for tree in self._trees:
            tree.back_up()
            edits += self._search(tree)
        self._trees = [tree for tree in self._trees if not tree.root.ended]
        if self._trees and not self._leaves:  # all are in the middle of simulations that need nothing
            return [*edits, Ask(list, [], _A_STEP)]
        return edits + self._compute(group)

    def _search(self, tree: Tree) -> list[Edit]:
        """Go on until leaves have to be computed, or valued from outside, or the output is complete.

        Or until that took so many simulations that it is to go on in a later step.
        """
        edits: list[Edit] = []
        for _ in range(max(1, _AT_ONCE // (self._top_k * self._params.leaf_batch_size))):
            while tree.left == 0:
                edits += self._emit(tree)
                if tree.root.ended:
                    return edits
            tree.select()
            fresh = [leaf for leaf in tree.wave if leaf.visits == 0]
            for leaf in fresh:
                if leaf is not tree.root:
                    self._settle(leaf)
            if any(leaf.ended is None for leaf in fresh) or (fresh and self._params.value_fn is not None):
                self._enlist(tree, fresh)
                return edits
            for leaf in fresh:
                leaf.own = _default(leaf)
            tree.back_up()
        return edits

    def _enlist(self, tree: Tree, fresh: list[Node]) -> None:
        """Let new leaves be computed and valued."""
        first = (tree.output << 32) + tree.done
        self._streams += [first + i for i, leaf in enumerate(tree.wave) if leaf.visits == 0]
        self._leaves += fresh
        self._tips += fresh

    def _compute(self, group: Group) -> list[Edit]:
        """One row for each leaf that is not terminal, in a fork of its parent."""
        indices = [index for index, leaf in enumerate(self._leaves) if leaf.ended is None]
        if not indices:
            return self._value(group) if self._leaves else []
        dst = group.fresh(len(indices))
        self._flying = dict(zip(dst, indices, strict=True))
        src: list[int] = []
        token: list[int] = []
        for seq, index in self._flying.items():
            leaf = self._leaves[index]
            assert leaf.parent is not None
            src.append(leaf.parent.seq)
            token.append(leaf.token)
            leaf.seq = seq
        return [Grow(src, token, dst, [self._streams[index] for index in indices])]

    def _emit(self, tree: Tree) -> list[Edit]:
        """Deliver the child that the simulations favour, and go on from there."""
        expansion = tree.root.expansion
        assert expansion is not None
        if not expansion.token:
            raise NoTokenError(f"request {self._request.id!r}: its bans, logit_bias or penalties left no token to choose")
        chosen = tree.draw(self._request.spec.seed) if self._params.visit_temperature else tree.best()
        if chosen.visits == 0:
            self._settle(chosen)
        if self._params.trace and self.complete:
            self._record(tree, chosen)
        tops = [expansion.tops[chosen.index]] if expansion.tops else None
        edits: list[Edit] = [Emit(tree.output, [chosen.token], [expansion.logp[chosen.index]], tops)]
        if chosen.ended is not None:
            reason, stop_reason = chosen.ended
            edits.append(Finish(tree.output, reason, None, stop_reason))
        return [*edits, Drop(tree.move(chosen))]

    def _record(self, tree: Tree, chosen: Node) -> None:
        """Put a step into the trace, unless it is full."""
        parent, token, prior, visits, value = map(list, zip(*tree.entries(), strict=True))
        self._traced += len(parent)
        self.complete = self._traced <= _TRACED
        if self.complete:
            self._trace.append(MCTSStep(tree.output, parent, token, prior, visits, value, 1 + chosen.index))


def _valued(
    value_fn: Callable[[list[Any]], Sequence[float]],
    rules: TextRules | None,
    stops: list[int | str | None],
    leaves: list[Leaf],
) -> Sequence[float]:
    """What value_fn says of the leaves, whose texts are made here: it runs in a thread of its own."""
    for leaf, stop in zip(leaves, stops, strict=True):
        leaf.prompt_token_ids = leaf.prompt_token_ids.copy()  # they are value_fn's to change
        if rules is not None:
            leaf.text = rules.text(leaf.token_ids, stop)
    return value_fn(leaves)


def _default(tip: Node) -> float:
    """What a leaf is worth where nobody else says so: the geometric mean of its tokens' probabilities."""
    return math.exp(tip.cumulative / tip.length) if tip.length else 1.0

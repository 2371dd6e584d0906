"""The statistics of a search tree, without sequences or a model."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagefork.scheduler.search_params import MCTSParams
from pagefork.scheduler.strategies._tree import Expansion, Node, Tree

PRIORS = st.lists(st.floats(0.01, 1), min_size=1, max_size=12, unique=True)


def expansion(priors: list[float]) -> Expansion:
    """Tokens 0, 1, ... with these chances, the best first."""
    chances = sorted(priors, reverse=True)
    total = sum(chances)
    count = len(chances)
    return Expansion(list(range(count)), [p / total for p in chances], [-1.0] * count)


def search(
    tree: Tree, rng: np.random.Generator, priors: list[float], value: float | None = None, depth: int = 99
) -> Counter[Node]:
    """Run the simulations that are left, nodes at `depth` being terminal; how many ended at each node.

    Without `value` leaves are worth random numbers.
    """
    ends: Counter[Node] = Counter()
    while tree.left:
        tree.select()
        ends.update(tree.wave)
        for leaf in tree.wave:
            if leaf.visits == 0:
                leaf.expansion = expansion(priors)
                leaf.ended = ("length", None) if leaf.length == depth else None
                leaf.own = float(rng.random()) if value is None else value
        tree.back_up()
    return ends


def is_apportioned(visits: list[int], prior: list[float], seats: int) -> bool:
    """D'Hondt: the largest of all quotients p / 1, p / 2, ... win a seat each; of those that are equal any may."""
    last_won = min((p / count for p, count in zip(prior, visits, strict=True) if count), default=math.inf)
    first_lost = max(p / (count + 1) for p, count in zip(prior, visits, strict=True))
    return sum(visits) == seats and first_lost <= last_won * (1 + 1e-9)


@settings(deadline=None)
@example(priors=[1.0, 0.5, 0.75, 0.1875], seats=46, batch=1, value=0.0, c=1.0)  # 1 / 20 is 0.75 / 15
@given(priors=PRIORS, seats=st.integers(0, 60), batch=st.integers(1, 9), value=st.floats(-2, 2), c=st.floats(0.01, 5))
def test_a_constant_value_apportions_visits_by_prior(priors: list[float], seats: int, batch: int, value: float, c: float) -> None:
    tree = Tree(MCTSParams(num_simulations=seats + 1, leaf_batch_size=batch, c_puct=c, max_depth=2), 0)
    search(tree, np.random.default_rng(0), priors, value)
    assert tree.root.expansion is not None
    visits = [child.visits for child in tree.root.children] + [0] * (len(priors) - len(tree.root.children))
    assert is_apportioned(visits, tree.root.expansion.prior, seats)
    assert tree.best().index == 0


@settings(deadline=None)
@given(
    priors=PRIORS, count=st.integers(1, 80), batch=st.integers(1, 9), limit=st.integers(1, 4),
    selection=st.sampled_from(["puct", "ucb1"]), fpu=st.sampled_from(["parent", "zero"]), moves=st.integers(0, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_visits_of_a_node_are_its_own_and_those_of_its_children(
    priors: list[float], count: int, batch: int, limit: int, selection: Any, fpu: Any, moves: int, seed: int
) -> None:
    """Of the first root just one is its own. Also after moves; nothing stays pending; values are means of what was found."""
    params = MCTSParams(num_simulations=count, leaf_batch_size=batch, max_depth=limit, selection=selection, fpu=fpu)
    tree, rng, ends = Tree(params, 0), np.random.default_rng(seed), Counter[Node]()
    for _ in range(moves + 1):
        before = tree.root.visits
        ends += search(tree, rng, priors, depth=moves + 2)
        assert tree.root.visits == before + count
        for node in tree.root.below():
            assert node.pending == 0
            assert node.length - tree.root.length <= limit
            assert node.visits == ends[node] + sum(child.visits for child in node.children)
            total = ends[node] * node.own + sum(child.value * child.visits for child in node.children)
            assert node.value == pytest.approx(total / node.visits)
            if node.ended is None and node.length < limit:
                assert ends[node] == 1
        tree.move(tree.best())


def test_a_wave_ends_at_a_leaf_that_is_in_it() -> None:
    """One candidate: whoever comes second would go to the same leaf."""
    tree = Tree(MCTSParams(num_simulations=9, leaf_batch_size=4), 0)
    for expected in range(5):
        tree.select()
        assert [leaf.length for leaf in tree.wave] == [expected]
        tree.wave[0].expansion = expansion([1.0])
        tree.back_up()


def test_a_wave_goes_to_different_leaves_and_takes_no_more_than_are_left() -> None:
    tree = Tree(MCTSParams(num_simulations=7, leaf_batch_size=4, c_puct=1.0), 0)
    tree.select()
    tree.wave[0].expansion = expansion([0.3, 0.25, 0.25, 0.2])
    tree.back_up()
    sizes = []
    while tree.left:
        tree.select()
        assert len({id(leaf) for leaf in tree.wave}) == len(tree.wave)
        sizes.append(len(tree.wave))
        for leaf in tree.wave:
            leaf.expansion = expansion([0.6, 0.4])
        tree.back_up()
    assert sizes == [4, 2]


def test_a_terminal_node_is_visited_again_within_a_wave() -> None:
    tree = Tree(MCTSParams(num_simulations=12, leaf_batch_size=4, top_k=1), 0)
    search(tree, np.random.default_rng(0), [1.0], value=0.5, depth=1)
    (child,) = tree.root.children
    assert (child.visits, child.value, tree.root.visits) == (11, 0.5, 12)


def test_ucb1_visits_every_child_once_by_prior_and_then_the_best_by_value() -> None:
    tree = Tree(MCTSParams(num_simulations=401, leaf_batch_size=1, selection="ucb1", max_depth=1, c_puct=0.3), 0)
    worth = [0.1, 0.2, 0.9, 0.3]
    order: list[int] = []
    while tree.left:
        tree.select()
        (leaf,) = tree.wave
        if leaf is tree.root:
            leaf.expansion = expansion([4, 3, 2, 1])
        else:
            order.append(leaf.index)
            leaf.expansion, leaf.own = expansion([1.0]), worth[leaf.index]
        tree.back_up()
    assert order[:4] == [0, 1, 2, 3]
    assert order.count(2) > 200
    # Each choice is the argmax of the formula over what was counted before it.
    for i in range(4, 400):
        n = np.bincount(order[:i], minlength=4)
        assert order[i] == int(np.argmax(np.array(worth) + 0.3 * np.sqrt(np.log(i + 1) / n)))


def test_unvisited_children_are_worth_what_fpu_says() -> None:
    """With a parent worth 1 and a first child worth 0.4, `parent` tries the second child; `zero` stays with the first."""
    expected: dict[Any, list[int]] = {"parent": [1, 1], "zero": [2, 0]}
    for fpu, visits in expected.items():
        tree = Tree(MCTSParams(num_simulations=3, leaf_batch_size=1, fpu=fpu, c_puct=0.1, max_depth=1), 0)
        for own in (1.0, 0.4, 0.4):
            tree.select()
            tree.wave[0].expansion = expansion([0.6, 0.4])
            tree.wave[0].own = own
            tree.back_up()
        assert [child.visits for child in (*tree.root.children, Node(None, 0, 0, 0))[:2]] == visits


@pytest.mark.parametrize("reuse", [True, False])
def test_moving_keeps_the_subtree_or_only_its_root_and_ends_all_other_sequences(reuse: bool) -> None:
    tree = Tree(MCTSParams(num_simulations=40, leaf_batch_size=4, reuse_tree=reuse), 0)
    search(tree, np.random.default_rng(3), [0.5, 0.3, 0.2])
    for seq, node in enumerate(tree.root.below()):
        node.seq = seq
    everything = {node.seq for node in tree.root.below()}
    chosen = tree.best()
    below = list(chosen.below())
    ended = tree.move(chosen)
    kept = {node.seq for node in tree.root.below()}
    assert tree.root is chosen
    assert sorted([*ended, *kept]) == sorted(everything)
    if reuse:
        assert list(chosen.below()) == below and len(below) > 1
        assert tree.left == 40
    else:
        assert (chosen.visits, chosen.value, chosen.children, tree.left) == (1, chosen.own, [], 39)
    assert chosen.tokens() == [chosen.token]


def test_visit_temperature_draws_in_proportion_to_powers_of_visits() -> None:
    tree = Tree(MCTSParams(visit_temperature=0.5), 0)
    tree.root.expansion = expansion([3, 2, 1])
    for index, visits in enumerate((1, 2, 3)):
        tree.root.child(index).visits = visits
    drawn = Counter(tree.draw(seed).index for seed in range(4000))
    for index, share in enumerate((1 / 14, 4 / 14, 9 / 14)):
        assert abs(drawn[index] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    again = Tree(MCTSParams(visit_temperature=0.5), 1)
    again.root = tree.root
    assert [tree.draw(seed).index for seed in range(64)] != [again.draw(seed).index for seed in range(64)]


def test_the_most_visited_child_is_best_then_the_most_valuable_then_the_most_probable() -> None:
    tree = Tree(MCTSParams(), 0)
    tree.root.expansion = expansion([4, 3, 2, 1])
    assert tree.best().index == 0
    for statistics, best in (([(2, 0.1), (3, 0.0), (3, 0.0)], 1), ([(3, 0.1), (3, 0.2), (2, 9.0)], 1), ([(1, 0.5), (1, 0.5)], 0)):
        tree.root.children = []
        for index, (visits, value) in enumerate(statistics):
            child = tree.root.child(index)
            child.visits, child.value = visits, value
        assert tree.best().index == best


def test_entries_list_the_root_its_candidates_and_all_visited_nodes() -> None:
    tree = Tree(MCTSParams(num_simulations=30, leaf_batch_size=3), 0)
    search(tree, np.random.default_rng(1), [0.6, 0.3, 0.05, 0.05])
    entries = list(tree.entries())
    assert entries[0][:2] == (-1, -1)
    assert [entry[:2] for entry in entries[1:5]] == [(0, token) for token in range(4)]
    assert sorted(entry[3] for entry in entries if entry[3]) == sorted(node.visits for node in tree.root.below())
    assert all(0 <= entry[0] < place for place, entry in enumerate(entries) if place)
    assert entries[0][3] == 1 + sum(entry[3] for entry in entries if entry[0] == 0)


def test_a_node_that_nothing_can_follow_is_visited_again() -> None:
    tree = Tree(MCTSParams(num_simulations=6, leaf_batch_size=1), 0)
    while tree.left:
        tree.select()
        (leaf,) = tree.wave
        if leaf.visits == 0:
            leaf.expansion = expansion([0.6, 0.4] if leaf is tree.root else [])
            leaf.own = 1.0
        tree.back_up()
    assert [child.visits for child in tree.root.children] == [3, 2]

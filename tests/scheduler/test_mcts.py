"""Monte Carlo tree search on the oracle's model, compared with a search that knows no sequences and no waves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake import FakeRunner
from support.harness import Harness
from support.mcts_reference import Path, Search, outputs
from support.oracle import VOCAB, continuation, scores
from support.toys import LookToyParams, RolloutToyParams, value

from pagefork.scheduler.edits import Update
from pagefork.scheduler.errors import NoTokenError
from pagefork.scheduler.params import SamplingParams
from pagefork.scheduler.plan import Plan, Spec
from pagefork.scheduler.search_params import MCTSParams
from pagefork.scheduler.strategies.base import Emit, Top
from pagefork.scheduler.strategies.mcts import MCTSStep

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
STOPS = frozenset({7})


class TwoTokens:
    """Text rules that stop where the last two tokens add up to a multiple of 9."""

    def start(self) -> int:
        return -1

    def check(self, state: int, token: int) -> tuple[int, str | None]:
        return token, "nine" if state >= 0 and (state + token) % 9 == 0 else None

    def text(self, tokens: list[int], stop: int | str | None = None) -> str:
        return " ".join(map(str, tokens))


def hashed(leaves: Sequence[Any]) -> list[float]:
    """A value of every leaf that nothing but its tokens decides."""
    return [value(leaf.token_ids) for leaf in leaves]


def params(**fields: Any) -> MCTSParams:
    return MCTSParams(**{"max_tokens": 5, "num_simulations": 12, "leaf_batch_size": 4, "top_k": 4, "trace": True, **fields})


def trees(steps: list[MCTSStep], output: int) -> list[dict[Path, int]]:
    """By emitted token of an output, the visits of the nodes of its tree, by path from the root."""
    found = []
    for step in steps:
        paths: list[Path] = [()]
        for parent, token in zip(step.parent[1:], step.token[1:], strict=True):
            paths.append((*paths[parent], token))
        if step.output == output:
            found.append({path: visits for path, visits in zip(paths, step.visits, strict=True) if visits})
    return found


def steps_of(harness: Harness, name: str) -> list[MCTSStep]:
    trace = harness.requests[name].trace
    assert trace is not None and trace.complete
    return trace.steps


def searched(settings: MCTSParams, harness: Harness | None = None, **options: Any) -> tuple[list[list[int]], list[MCTSStep]]:
    """Tokens and trace of one request that has the scheduler to itself."""
    harness = harness or Harness()
    name = harness.add(PROMPT, settings, **options)
    harness.run()
    assert harness.requests[name].error is None
    return harness.requests[name].tokens, steps_of(harness, name)


def assert_equal(harness: Harness, name: str, searches: list[Search]) -> None:
    tracked = harness.requests[name]
    assert tracked.error is None
    for output, search in enumerate(searches):
        assert tracked.tokens[output] == list(search.root)
        assert tracked.logps[output] == search.logps
        assert tracked.reasons[output] == search.reason(search.root)
        steps = [step for step in steps_of(harness, name) if step.output == output]
        assert trees(steps, output) == search.trees
        assert [step.token[step.chosen] for step in steps] == list(search.root)
        for length, (step, values) in enumerate(zip(steps, search.values, strict=True)):
            children = search.children(search.root[:length])
            entries = [i for i, parent in enumerate(step.parent) if parent == 0]
            assert [(step.token[i], step.prior[i]) for i in entries] == [(child.token, child.prior) for child in children]
            assert [step.value[0], *(step.value[i] for i in entries)] == pytest.approx(values)


@pytest.mark.parametrize("rules", [None, TwoTokens()])
@pytest.mark.parametrize("asked", [False, True])
@settings(deadline=None, max_examples=12)
@given(
    fields=st.fixed_dictionaries({
        "num_simulations": st.integers(1, 30), "c_puct": st.sampled_from([0.0, 0.3, 1.0, 4.0]), "top_k": st.integers(1, 6),
        "max_depth": st.integers(1, 4), "rollout_tokens": st.integers(0, 3), "max_tokens": st.integers(1, 6),
        "selection": st.sampled_from(["puct", "ucb1"]), "fpu": st.sampled_from(["parent", "zero"]), "reuse_tree": st.booleans(),
        "visit_temperature": st.sampled_from([0.0, 0.5, 2.0]), "min_tokens": st.integers(0, 1),
    }),
    n=st.integers(1, 3), stop=st.integers(0, VOCAB - 1), start=st.integers(0, 99),
)  # fmt: skip
def test_one_leaf_at_a_time_equals_a_sequential_search(
    rules: TwoTokens | None, asked: bool, fields: dict[str, Any], n: int, stop: int, start: int
) -> None:
    """Tokens, log-probs, reasons and every tree, of each output."""
    own = params(**fields, n=n if fields["visit_temperature"] else 1, leaf_batch_size=1, value_fn=hashed if asked else None)
    stops = frozenset({stop, stop // 2})
    prompt = [start % VOCAB, *PROMPT]
    harness = Harness(num_blocks=400)
    name = harness.add(prompt, own, stops, rules=rules)
    harness.run()
    spec = harness.requests[name].spec
    assert spec is not None
    own_value = (lambda tokens, cumulative, reason: value(tokens)) if asked else None
    assert_equal(harness, name, outputs(prompt, spec, own, stops=stops, value=own_value, rules=rules))


def test_one_simulation_is_greedy() -> None:
    for fields in ({}, {"reuse_tree": False}, {"selection": "ucb1"}, {"visit_temperature": 1.0}, {"value_fn": hashed}):
        tokens, _ = searched(params(num_simulations=1, max_tokens=9, **fields))
        assert tokens == [continuation(PROMPT, Spec(prompt_len=len(PROMPT)), 0, 9)]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_constant_value_without_reuse_gives_greedy_tokens_and_visits_apportioned_by_prior(batch: int) -> None:
    own = params(
        num_simulations=40, top_k=7, leaf_batch_size=batch, reuse_tree=False, value_fn=lambda leaves: [0.3] * len(leaves)
    )
    tokens, steps = searched(own)
    assert tokens == [continuation(PROMPT, Spec(prompt_len=len(PROMPT)), 0, 5)]
    for i, step in enumerate(steps):
        chances = np.sort(np.exp(scores([*PROMPT, *tokens[0][:i]], Spec(prompt_len=len(PROMPT))).astype(np.float32)))[::-1][:7]
        quotients = sorted(((float(p) / d, k) for k, p in enumerate(chances) for d in range(1, 40)), reverse=True)[:39]
        won = [sum(k == place for _, k in quotients) for place in range(7)]
        assert step.visits[1:8] == won
        assert step.visits[0] == 40


def test_thousands_of_simulations_find_the_best_of_all_outputs() -> None:
    """Four tokens of four candidates each; only complete outputs are worth anything, and one is worth more than all others."""
    for start in range(3):
        prompt = [start, *PROMPT]
        spec = Spec(prompt_len=len(prompt))
        complete: list[list[int]] = [[]]
        for _ in range(4):
            tops = [np.argsort(-scores([*prompt, *tokens], spec), kind="stable")[:4].tolist() for tokens in complete]
            complete = [[*tokens, token] for tokens, top in zip(complete, tops, strict=True) for token in top]
        assert len(complete) == 256
        rewards = {tuple(tokens): value(tokens) / 2 for tokens in complete}
        best = rewards[tuple(complete[int(value(prompt) * 256)])] = 1.0

        def reward(leaves: list[Any], rewards: dict[tuple[int, ...], float] = rewards) -> list[float]:
            return [rewards.get(tuple(leaf.token_ids), 0.0) for leaf in leaves]

        harness = Harness(num_blocks=600)
        name = harness.add(prompt, params(max_tokens=4, num_simulations=2000, c_puct=2.0, value_fn=reward))
        harness.run()
        assert rewards[tuple(harness.requests[name].tokens[0])] == best
        assert harness.scheduler.counters.forward_tokens <= len(prompt) + 4 + 16 + 64, "a revisit was computed again"


class Recorder:
    """A value function that keeps what it was asked."""

    def __init__(self) -> None:
        self.waves: list[list[Any]] = []

    def __call__(self, leaves: list[Any]) -> list[float]:
        self.waves.append(leaves)
        return hashed(leaves)


@pytest.mark.parametrize("rollout", [0, 3])
def test_a_value_function_sees_each_new_leaf_once_with_its_tokens_text_and_log_prob(rollout: int) -> None:
    asked = Recorder()
    own = params(value_fn=asked, rollout_tokens=rollout, num_simulations=30, max_depth=2, max_tokens=4)
    _, steps = searched(own, rules=TwoTokens())
    leaves = list(itertools.chain.from_iterable(asked.waves))
    assert asked.waves[0][0].token_ids[: 4 - rollout or None] == [] or rollout
    assert all(0 < len(wave) <= 4 for wave in asked.waves)
    for leaf in leaves:
        tokens = leaf.token_ids
        assert leaf.prompt_token_ids == PROMPT
        assert leaf.text == TwoTokens().text(tokens)
        logps = [scores([*PROMPT, *tokens[:i]], Spec(prompt_len=8))[token] for i, token in enumerate(tokens)]
        assert leaf.cumulative_logprob == pytest.approx(sum(logps), abs=1e-5)
        nine = any((a + b) % 9 == 0 for a, b in itertools.pairwise(tokens))
        assert leaf.finish_reason == ("stop" if nine else "length" if len(tokens) == 4 else None)
    nodes = sum(len(tree) for tree in trees(steps[-1:], 0))
    assert len(leaves) >= nodes
    if not rollout:
        assert len({tuple(leaf.token_ids) for leaf in leaves}) == len(leaves)
        assert {tuple(leaf.token_ids) for leaf in asked.waves[0]} == {()}


def test_a_leaf_costs_one_row_and_what_is_kept_is_not_computed_again() -> None:
    asked = Recorder()
    harness = Harness(num_blocks=300)
    harness.add(PROMPT, params(value_fn=asked, num_simulations=25, max_tokens=6))
    harness.run()
    computed = sum(leaf.finish_reason is None for wave in asked.waves for leaf in wave)
    assert harness.scheduler.counters.forward_tokens == len(PROMPT) + computed - 1


VARIANTS: list[dict[str, Any]] = [
    {},
    {"n": 3, "visit_temperature": 1.0, "leaf_batch_size": 2},
    {"rollout_tokens": 2, "n": 2, "visit_temperature": 0.7, "leaf_batch_size": 3},
    {"value_fn": hashed, "max_depth": 2, "num_simulations": 20},
    {"value_fn": hashed, "rollout_tokens": 1, "reuse_tree": False, "selection": "ucb1"},
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_neither_neighbours_nor_budgets_nor_small_caches_change_a_tree(variant: int) -> None:
    """Requests that wait, run in parts, lose parked blocks or everything, one plan late or not."""
    own = params(**VARIANTS[variant], max_tokens=6, top_k=3)
    width = own.width
    neighbours = [SamplingParams(max_tokens=20), LookToyParams(max_tokens=9), own, RolloutToyParams(max_tokens=4)]
    preempted = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        older = int(seed % 4 > 0)
        alone = Harness(num_blocks=500, slots=24, budget=60)
        harness = Harness(
            num_blocks=max(3 * width + 4, 24) + int(rng.integers(5)), slots=width + int(rng.integers(2, 9)),
            budget=width + int(rng.integers(6, 20)), lag=int(rng.integers(2)), enable_prefix_caching=bool(rng.integers(2)),
        )  # fmt: skip
        for _ in range(older):  # requests draw from a seed that is their number
            alone.add([1], SamplingParams(max_tokens=1))
            harness.add(rng.integers(0, VOCAB, 20).tolist(), SamplingParams(n=2, max_tokens=30))
        names = alone.add(PROMPT, own, STOPS), harness.add(PROMPT, own, STOPS)
        alone.run()
        group = harness.scheduler._by_id[names[1]]
        for other in range(int(rng.integers(6))):
            for _ in range(int(rng.integers(4))):
                harness.step()
            harness.add(rng.integers(0, VOCAB, int(rng.integers(1, 30))).tolist(), neighbours[other % 4])
        harness.run()
        harness.assert_expected()
        expected, found = alone.requests[names[0]], harness.requests[names[1]]
        assert (found.tokens, found.logps, found.reasons) == (expected.tokens, expected.logps, expected.reasons)
        for output in range(own.n):
            assert trees(steps_of(harness, names[1]), output) == trees(steps_of(alone, names[0]), output)
        preempted += group.preemptions
    assert preempted, "no cache was small enough"


def test_a_cache_that_holds_no_tree_sheds_nodes_without_changing_it() -> None:
    own = params(num_simulations=60, max_tokens=6, top_k=5)
    roomy, tight = Harness(num_blocks=600), Harness(num_blocks=16)
    assert searched(own, tight) == searched(own, roomy)
    assert tight.scheduler.counters.forward_tokens > roomy.scheduler.counters.forward_tokens
    assert tight.scheduler.residents.preemptions == 0


def test_nodes_are_shed_leaves_before_inner_nodes_and_the_least_visited_first() -> None:
    harness = Harness(num_blocks=300)
    name = harness.add(PROMPT, params(num_simulations=200, leaf_batch_size=2))
    for _ in range(60):
        harness.step()
    group = harness.scheduler._by_id[name]
    strategy: Any = group.strategy
    nodes = {node.seq: node for tree in strategy._trees for node in tree.root.below() if node.seq >= 0}
    order = list(strategy.shed(group))
    running = {seq for seq in nodes if harness.scheduler.kv.table.slot[seq] >= 0}
    assert set(order) == set(nodes) - running
    assert running
    inner = [any(child.seq >= 0 for child in nodes[seq].children) for seq in order]
    assert inner == sorted(inner) and any(inner) and not all(inner)
    for kind in (True, False):
        visits = [nodes[seq].visits for seq, is_inner in zip(order, inner, strict=True) if is_inner is kind]
        assert visits == sorted(visits)


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_an_abort_at_any_step_leaves_nothing(variant: int) -> None:
    """In a prompt, a wave, a rollout or while values are asked for."""
    own = params(**VARIANTS[variant])
    for when in range(1, 60, 2):
        harness = Harness(num_blocks=200, slots=16)
        harness.answer_at_once = False
        name = harness.add(PROMPT, own)
        for step in range(when):
            harness.step()
            if harness.asks and step < when - 1:
                harness.answer()
        done = harness.requests[name].done
        harness.abort(name)
        harness.run()
        harness.assert_expected()
        if done:
            assert when > 3
            break
        assert "abort" in harness.requests[name].reasons.values()


class Topped(Harness):
    """Keeps the read-outs that come with tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tops: list[Top] = []

    def take(self, updates: list[Update]) -> None:
        for update in updates:
            for event in update.events:
                if isinstance(event, Emit) and event.tops is not None:
                    self.tops += event.tops
        super().take(updates)


@pytest.mark.parametrize(("logprobs", "count"), [(None, None), (0, 0), (2, 2), (-1, VOCAB), (99, VOCAB)])
def test_log_probs_are_those_of_the_model_at_the_chosen_token(logprobs: int | None, count: int | None) -> None:
    harness = Topped()
    own = params(logprobs=logprobs)
    name = harness.add(PROMPT, own, rank=logprobs is not None, extra={"vocab_size": VOCAB})
    harness.run()
    (tokens,) = harness.requests[name].tokens
    assert len(harness.tops) == (0 if logprobs is None else len(tokens))
    for i, top in enumerate(harness.tops):
        values = scores([*PROMPT, *tokens[:i]], Spec(prompt_len=8)).astype(np.float32)
        best = np.argsort(-values, kind="stable")[:count]
        assert top.ids.tolist() == best.tolist()
        assert top.logps.tolist() == values[best].tolist()
        assert top.rank == 1 + int((values > values[tokens[i]]).sum())
        assert harness.requests[name].logps[0][i] == float(values[tokens[i]])


def test_outputs_of_one_request_have_trees_of_their_own_and_different_tokens() -> None:
    tokens, steps = searched(params(n=4, visit_temperature=1.0, num_simulations=30, top_k=6), Harness(slots=20, num_blocks=300))
    assert len(set(map(tuple, tokens))) > 1
    assert trees(steps, 0)[0] == trees(steps, 3)[0], "the first tree depends on the prompt alone"
    _, steps = searched(params(n=2, visit_temperature=1.0, rollout_tokens=4))
    assert trees(steps, 0)[0] != trees(steps, 1)[0], "rollouts of two outputs were the same"


class Banned(FakeRunner):
    """Processing leaves no token from some length on; the model's logits are good."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def submit(self, plan: Plan) -> None:
        super().submit(plan)
        for probe, read in zip(plan.probes, self._result.reads, strict=True):
            rows = np.searchsorted(plan.rows.offset, probe.at, side="right") - 1
            long = (plan.rows.start + np.diff(plan.rows.offset))[rows] >= self._length
            assert read.top_id is not None and read.top_p is not None
            read.top_id[long], read.top_p[long] = -1, 0.0


def test_a_request_with_no_token_left_fails_once_its_search_comes_to_that() -> None:
    for length in (8, 9, 11, 99):
        harness: Any = Harness(num_blocks=200)
        harness.runner = Banned(length)
        name = harness.add(PROMPT, params(max_tokens=9))
        harness.run()
        error, (tokens,) = harness.requests[name].error, harness.requests[name].tokens
        assert (isinstance(error, NoTokenError), error is None) == (length < 99, length == 99)
        assert len(tokens) == 9 if error is None else len(tokens) <= length - len(PROMPT)


def test_a_trace_is_bounded_and_says_what_is_missing() -> None:
    harness: Any = Harness(num_blocks=100)
    harness.runner = FakeRunner()
    name = harness.add(PROMPT, params(num_simulations=2, top_k=90, max_tokens=150))
    harness.run()
    trace = harness.requests[name].trace
    assert trace is not None and not trace.complete
    assert 9900 < sum(len(step.parent) for step in trace.steps) <= 10_000
    assert len(harness.requests[name].tokens[0]) == 150


def test_simulations_that_need_no_row_leave_others_their_turn() -> None:
    """A tree that is used up at once, and simulations by the hundred thousand: many steps, and the same choice."""
    harness = Harness()
    name = harness.add(PROMPT, MCTSParams(num_simulations=100_000, max_depth=1, top_k=2, max_tokens=1), expected=None)
    harness.answer_at_once = False
    other = harness.add(PROMPT, SamplingParams(temperature=0, max_tokens=8))
    while not harness.requests[other].done:
        harness.step()
        if harness.asks:
            harness.answer()
    assert not harness.requests[name].done
    harness.run()
    assert len(harness.requests[name].tokens[0]) == 1

"""Contrastive search chooses what its definition says, in any batch, and holds nothing afterwards."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from support.contrastive import reference
from support.fake import FakeRunner
from support.harness import Harness
from support.oracle import VOCAB, continuation
from support.requests import GREEDY, GROUPS, prompt

from pagefork.scheduler.errors import NumericError
from pagefork.scheduler.params import SamplingParams
from pagefork.scheduler.plan import Plan, Probe, Reads, Result, Spec
from pagefork.scheduler.search_params import ContrastiveSearchParams as Params
from pagefork.scheduler.strategies.contrastive import ContrastiveStep, _Uncertainty

SETTINGS = [
    Params(max_tokens=12),
    Params(top_k=2, alpha=0.9, max_tokens=12),
    Params(top_k=8, alpha=0.1, max_tokens=12),
    Params(top_k=VOCAB + 7, alpha=0.5, max_tokens=12),
    Params(top_k=4, alpha=1.0, max_tokens=12),
    Params(top_k=4, window=1, max_tokens=12),
    Params(top_k=4, window=5, max_tokens=12),
    Params(top_k=4, frequency_penalty=0.5, max_tokens=12),
    Params(top_k=15, adaptive=True, max_tokens=12),
    Params(top_k=9, alpha=0.3, window=3, adaptive=True, max_tokens=12),
]
CACHES: list[dict[str, Any]] = [
    {},
    {"budget": 11, "slots": 10},
    {"num_blocks": 20, "block_size": 2, "slots": 8, "budget": 9},
    {"lag": 1},
    {"enable_prefix_caching": False},
]


def spec_of(tokens: list[int], params: Params) -> Spec:
    return Spec(prompt_len=len(tokens), frequency_penalty=params.frequency_penalty)


def add(harness: Harness, tokens: list[int], params: Params, stops: frozenset[int] = frozenset(), **options: Any) -> str:
    expected = [chosen.token for chosen in reference(tokens, spec_of(tokens, params), params, stops)]
    return harness.add(tokens, params, stops, expected=[expected], **options)


def fits(params: Params, cache: dict[str, Any]) -> bool:
    width = min(cache.get("slots", 12), cache.get("budget", 24) - cache.get("block_size", 4))
    return params.top_k <= width


@pytest.mark.parametrize("cache", CACHES)
def test_tokens_are_those_of_the_definition(cache: dict[str, Any]) -> None:
    """Alone, in every setting that the cache and the slots allow."""
    ran = 0
    for params in SETTINGS:
        if not fits(params, cache):
            continue
        for length in (1, 4, 7, 13):
            harness = Harness(**cache)
            add(harness, prompt(length, seed=length), params)
            harness.run()
            harness.assert_expected()
            ran += 1
    assert ran >= 16


def test_wide_settings_are_those_of_the_definition() -> None:
    for params in SETTINGS:
        harness = Harness(num_blocks=80, slots=40, budget=60)
        add(harness, prompt(9), params)
        harness.run()
        harness.assert_expected()


@pytest.mark.parametrize("seed", range(12))
def test_neighbours_and_preemption_change_nothing(seed: int) -> None:
    """A cache too small for all, a budget smaller than a generation of all, and strategies of other kinds beside."""
    rng = np.random.default_rng(seed)
    block_size, num_blocks = [(1, 30), (2, 20), (3, 16), (4, 15)][seed % 4]
    harness = Harness(num_blocks, block_size, slots=9, budget=10, lag=seed // 4 % 2)
    shared = prompt(int(rng.integers(3, 12)), seed)
    narrow = [params for params in SETTINGS if params.top_k <= 5]
    for i in range(5):
        tokens = shared[: int(rng.integers(1, len(shared) + 1))] if i % 2 else prompt(int(rng.integers(1, 12)), seed * 10 + i)
        params = narrow[int(rng.integers(len(narrow)))].replace(max_tokens=int(rng.integers(1, 9)))
        add(harness, tokens, params, frozenset({int(rng.integers(VOCAB))}) if i == 3 else frozenset())
        if i % 2:
            neighbour: Any = GREEDY if seed % 2 else GROUPS[i % len(GROUPS)].replace(max_tokens=4)
            harness.add(prompt(5, seed + i), neighbour)
        harness.step()
    harness.run()
    harness.assert_expected()


def test_small_caches_do_preempt() -> None:
    """Or the test above would show nothing."""
    harness = Harness(num_blocks=16, block_size=2, slots=9, budget=12)
    for i in range(4):
        add(harness, prompt(6, i), Params(top_k=3, max_tokens=9))
    harness.run()
    harness.assert_expected()
    assert harness.scheduler.residents.preemptions > 0


@pytest.mark.parametrize("params", [Params(alpha=0, max_tokens=15), Params(top_k=1, max_tokens=15)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_without_a_penalty_or_a_choice_it_is_greedy(params: Params, adaptive: bool) -> None:
    harness = Harness()
    tokens = prompt(9)
    expected = continuation(tokens, Spec(prompt_len=9), 0, 15)
    harness.add(tokens, params.replace(adaptive=adaptive), expected=[expected])
    harness.run()
    harness.assert_expected()


def test_the_penalty_differs_between_candidates() -> None:
    """One penalty for all candidates of a token would choose greedily, whatever alpha."""
    harness = Harness()
    name = add(harness, prompt(9), Params(alpha=0.6, max_tokens=20, trace=True))
    harness.run()
    trace = harness.requests[name].trace
    assert trace is not None
    assert all(len(set(step.similarity)) == len(step.similarity) for step in trace.steps)
    assert any(step.chosen > 0 for step in trace.steps)


def test_one_forward_of_the_prompt_and_one_per_token() -> None:
    """1 + N steps; each after the first computes one token for every candidate."""
    harness = Harness(budget=40)
    rows: list[int] = []
    submit = harness.runner.submit

    def counting(plan: Plan) -> None:
        rows.append(len(plan.rows.tokens))
        submit(plan)

    harness.runner.submit = counting  # type: ignore[method-assign]
    name = add(harness, prompt(9), Params(top_k=6, max_tokens=14))
    harness.run()
    assert rows == [9] + [6] * 14
    usage = harness.requests[name].usage
    assert usage is not None and usage.forward_tokens == 9 + 6 * 14 and usage.forks == 5 * 14


def test_end_tokens_end_it_when_they_are_chosen() -> None:
    """Not when they are a candidate that loses."""
    tokens = prompt(9)
    full = reference(tokens, Spec(prompt_len=9), Params(max_tokens=20))
    end = full[8].token
    assert end not in [chosen.token for chosen in full[:8]] and any(end in chosen.ids for chosen in full[:8])
    harness = Harness()
    name = add(harness, tokens, Params(max_tokens=20), frozenset({end}))
    harness.run()
    harness.assert_expected()
    assert harness.requests[name].tokens == [[chosen.token for chosen in full[:9]]]
    assert harness.requests[name].reasons == {0: "stop"}


class Rules:
    """The text of a token is its id; the state is the text so far."""

    def __init__(self, stop: str) -> None:
        self.stop = stop

    def start(self) -> str:
        return ""

    def check(self, state: str, token: int) -> tuple[str, str | None]:
        text = f"{state} {token}"
        return text, self.stop if text.endswith(self.stop) else None

    def text(self, tokens: list[int], stop: int | str | None = None) -> str:
        return "".join(f" {token}" for token in tokens)


@pytest.mark.parametrize("min_tokens", [0, 6])
def test_stop_texts_are_looked_for_in_the_chosen_tokens(min_tokens: int) -> None:
    tokens = prompt(9)
    full = [chosen.token for chosen in reference(tokens, Spec(prompt_len=9), Params(max_tokens=12))]
    rules = Rules(f" {full[3]} {full[4]}")
    harness = Harness()
    params = Params(max_tokens=12, min_tokens=min_tokens, stop=[rules.stop])
    name = harness.add(tokens, params, expected=[full[: 12 if min_tokens else 5]], rules=rules)
    harness.run()
    harness.assert_expected()
    assert harness.requests[name].reasons == {0: "length" if min_tokens else "stop"}


def test_log_probs_are_of_the_token_that_was_chosen() -> None:
    tokens, params = prompt(9), Params(max_tokens=12)
    harness = Harness()
    name = add(harness, tokens, params)
    harness.run()
    expected = [chosen.logp for chosen in reference(tokens, Spec(prompt_len=9), params)]
    assert harness.requests[name].logps[0] == expected


@pytest.mark.parametrize("logprobs", [0, 3, -1])
def test_tables_of_log_probs_are_of_the_place_where_the_token_stands(logprobs: int) -> None:
    """Rank and most probable tokens belong to the distribution that the token was chosen from, not to the next one."""
    tokens, params = prompt(9), Params(max_tokens=8, logprobs=logprobs)
    harness = Harness()
    harness.add(tokens, params, rank=True, extra={"vocab_size": VOCAB})
    tops: list[Any] = []
    take = harness.take

    def taking(updates: list[Any]) -> None:
        tops.extend(top for update in updates for event in update.events for top in getattr(event, "tops", None) or ())
        take(updates)

    harness.take = taking  # type: ignore[method-assign]
    harness.run()
    count = VOCAB if logprobs < 0 else logprobs
    assert len(tops) == 8
    for top, chosen in zip(tops, reference(tokens, Spec(prompt_len=9), params), strict=True):
        assert top.rank == chosen.ids.index(chosen.token) + 1
        assert len(top.ids) == len(top.logps) == count
        assert top.ids.tolist()[:5] == chosen.ids[:count]
        if count:
            np.testing.assert_allclose(np.exp(top.logps[:5]), chosen.p[:count], rtol=1e-6)


def test_the_trace_is_what_was_weighed() -> None:
    for params in (Params(max_tokens=12, momentum=0.25, trace=True), Params(top_k=9, adaptive=True, max_tokens=12, trace=True)):
        harness = Harness()
        name = add(harness, prompt(9), params)
        harness.run()
        trace = harness.requests[name].trace
        assert trace is not None and trace.complete
        confidence = None
        for step, chosen in zip(trace.steps, reference(prompt(9), Spec(prompt_len=9), params), strict=True):
            assert isinstance(step, ContrastiveStep)
            assert step.token == chosen.ids and step.token[step.chosen] == chosen.token
            for found, expected in ((step.p, chosen.p), (step.similarity, chosen.sim), (step.score, chosen.score)):
                np.testing.assert_allclose(found, expected, atol=1e-6)
            assert step.alpha == pytest.approx(chosen.alpha)
            largest = max(chosen.p)
            confidence = largest if confidence is None else params.momentum * confidence + (1 - params.momentum) * largest
            assert step.confidence == pytest.approx(confidence)
        assert msgspec.json.decode(msgspec.json.encode(trace.steps), type=list[ContrastiveStep]) == trace.steps


def test_a_trace_ends_where_it_is_too_long() -> None:
    """And says so; what is generated does not end."""
    harness = Harness(num_blocks=400, slots=100, budget=200)
    harness.runner = FakeRunner()  # type: ignore[assignment]
    name = harness.add(prompt(3), Params(top_k=100, max_tokens=110, trace=True))
    harness.run()
    trace = harness.requests[name].trace
    assert len(harness.requests[name].tokens[0]) == 110
    assert trace is not None and not trace.complete and len(trace.steps) == 100


def test_no_trace_unless_asked_for() -> None:
    harness = Harness()
    name = add(harness, prompt(9), Params(max_tokens=5))
    harness.run()
    assert harness.requests[name].trace is None


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("lag", [0, 1])
def test_aborting_at_any_phase_gives_everything_back(steps: int, lag: int) -> None:
    harness = Harness(budget=8, lag=lag)
    name = add(harness, prompt(13), Params(top_k=4, max_tokens=9))
    other = harness.add(prompt(13), SamplingParams(n=2, max_tokens=9))
    for _ in range(steps):
        harness.step()
    harness.abort(name)
    harness.run()
    harness.assert_expected()
    assert harness.requests[name].reasons == {0: "abort"}
    assert set(harness.requests[other].reasons.values()) == {"length"}


@pytest.mark.parametrize("step", range(7))
def test_unusable_logits_at_any_phase_end_it_and_give_everything_back(step: int) -> None:
    harness = Harness(budget=8)
    harness.runner.poison = {step}
    name = add(harness, prompt(13), Params(top_k=4, max_tokens=9))
    harness.run()
    harness.assert_expected(NumericError)
    assert harness.requests[name].reasons == {0: "error" if step > 0 else "length"}  # step 0 computes a chunk of the prompt


class Tied(FakeRunner):
    """The score at alpha=0.5 is the same for all candidates, though the first is the most probable."""

    def _read(self, probe: Probe) -> Reads:
        reads = super()._read(probe)
        assert reads.top_p is not None
        reads.top_p[:] = [0.5, 0.25, 0.25]
        if reads.sim is not None:
            reads.sim[:] = [0.25, 0, 0]
        return reads


class Emptied:
    """The oracle, but no token has a chance after rows that end in `token`."""

    def __init__(self, harness: Harness, token: int) -> None:
        self._collect, self._submit, self._token = harness.runner.collect, harness.runner.submit, token
        self._fed: list[list[int]] = []

    def submit(self, plan: Plan) -> None:
        self._fed.append(plan.rows.tokens[plan.probes[0].at].tolist())
        self._submit(plan)

    def collect(self) -> Result:
        result = self._collect()
        for i, token in enumerate(self._fed.pop(0)):
            if token == self._token:
                result.reads[0].top_id[i], result.reads[0].top_p[i] = -1, 0  # type: ignore[index]
        return result


def test_only_a_chosen_candidate_needs_a_token_that_can_follow() -> None:
    """One that loses, or ends the output, may leave none; where the chosen one does, the request ends with an error."""
    tokens, params = prompt(9), Params(max_tokens=8)
    full = reference(tokens, Spec(prompt_len=9), params)
    chosen = [step.token for step in full]
    loser = next(token for step in full for token in step.ids if token not in chosen and token != tokens[-1])
    for dead, ends in ((loser, "length"), (chosen[-1], "length"), (chosen[2], "error")):
        harness = Harness()
        emptied = Emptied(harness, dead)
        harness.runner.submit, harness.runner.collect = emptied.submit, emptied.collect  # type: ignore[method-assign]
        name = add(harness, tokens, params)
        harness.run()
        assert harness.requests[name].reasons == {0: ends}
        if ends == "error":
            assert "left no token" in str(harness.requests[name].error)
        else:
            harness.assert_expected()


def test_equal_scores_go_to_the_more_probable_then_to_the_lower_id() -> None:
    harness = Harness()
    harness.runner = Tied()  # type: ignore[assignment]
    name = harness.add(prompt(3), Params(top_k=3, alpha=0.5, max_tokens=5, trace=True))
    harness.run()
    trace = harness.requests[name].trace
    assert trace is not None and all(len(set(step.score)) == 1 for step in trace.steps)
    assert harness.requests[name].tokens == [[0] * 5]


def test_more_uncertainty_means_more_candidates_and_more_penalty() -> None:
    """The middle of both is at the median of what was seen."""
    flat, middle, sharp = (np.array(p, np.float32) for p in ([0.2] * 5, [0.5, 0.2, 0.15, 0.1, 0.05], [0.96] + [0.01] * 4))
    for first, alpha in ((flat, 0.6), (middle, 0.3), (sharp, 0.5)):
        assert _Uncertainty(alpha, 5).settings(first) == (3, pytest.approx(alpha))  # 5 * 2 / 3
    found = []
    for p in (sharp, middle, flat):
        seen = _Uncertainty(0.6, 5)
        seen.settings(middle)
        found.append(seen.settings(p))
    assert [count for count, _ in found] == [2, 3, 4]
    assert found[0][1] < found[1][1] < found[2][1]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_extreme_uncertainty_stays_in_range(alpha: float) -> None:
    one, flat = np.array([1.0, 1e-40, 1e-44], np.float32), np.full(3, 1 / 3, np.float32)
    for first, then in ((one, flat), (flat, one)):
        seen = _Uncertainty(alpha, 3)
        for p in (first, then):
            count, weight = seen.settings(p)
            assert 1 <= count <= 3 and 0 <= weight <= 1

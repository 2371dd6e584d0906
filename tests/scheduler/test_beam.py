"""Beam search against a reference of its definition, and against every possible output."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from support import oracle
from support.beam_reference import Hypothesis, Logps, beam_search
from support.harness import Harness, Tracked

from pagefork.scheduler.edits import Update
from pagefork.scheduler.errors import ParameterError
from pagefork.scheduler.params import SamplingParams
from pagefork.scheduler.plan import Spec
from pagefork.scheduler.search_params import BeamSearchParams
from pagefork.scheduler.strategies import _beam_trace
from pagefork.scheduler.strategies._beam_trace import BeamStep
from pagefork.scheduler.strategies.base import Emit

PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]
EARLY: list[Any] = [False, True, "never"]


def model(prompt: list[int], spec: Spec | None) -> Logps:
    assert spec is not None
    return lambda tokens: oracle.scores([*prompt, *tokens], spec).astype(np.float32)


def assert_found(tracked: Tracked, expected: list[Hypothesis]) -> None:
    """The outputs are the expected hypotheses, the last one repeated where there are too few."""
    assert tracked.error is None and set(tracked.reasons.values()) <= {"stop", "length"}
    for index, tokens in enumerate(tracked.tokens):
        best = expected[min(index, len(expected) - 1)]
        assert tokens == best.tokens, f"output {index}"
        assert np.float32(tracked.scores[index] or 0.0) == best.score, f"output {index}"


def draw_params(rng: random.Random, widest: int, **fields: Any) -> BeamSearchParams:
    groups = rng.choice([1, 1, 2, 3, 4])
    width = groups * rng.randint(1, widest // groups)
    settings: dict[str, Any] = {
        "beam_width": width,
        "n": rng.randint(1, width),
        "length_penalty": rng.choice(PENALTIES),
        "early_stopping": rng.choice(EARLY),
        "num_beam_groups": groups,
        "diversity_penalty": rng.choice([0.0, 0.3, 2.0]) if groups > 1 else 0.0,
        "max_tokens": rng.choice([1, 2, 5, 9, 14]),
        "trace": rng.random() < 0.3,
        "logprobs": rng.choice([None, None, 0, 3]),
    }
    return BeamSearchParams(**settings | fields)


class Pairs:
    """Text rules: a stop text is any two tokens one after another whose sum is a multiple of five."""

    def start(self) -> tuple[int, ...]:
        return ()

    def check(self, state: tuple[int, ...], token: int) -> tuple[tuple[int, ...], str | None]:
        tokens = (*state, token)
        return tokens, "five" if self.stops(list(tokens)) else None

    def text(self, tokens: list[int], stop: int | str | None = None) -> str:
        return " ".join(map(str, tokens))

    @staticmethod
    def stops(tokens: list[int]) -> bool:
        return len(tokens) > 1 and sum(tokens[-2:]) % 5 == 0


class Listening(Harness):
    """Keeps every Emit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.emitted: list[Emit] = []

    def take(self, updates: list[Update]) -> None:
        super().take(updates)
        self.emitted += [event for update in updates for event in update.events if isinstance(event, Emit)]


def check_batch(harness: Harness, rng: random.Random, widest: int, requests: int, longest: int, **fields: Any) -> None:
    """Searches of all kinds, and sampling between them, find what they find alone."""
    searches = []
    for _ in range(requests):
        prompt = [rng.randrange(oracle.VOCAB) for _ in range(rng.randint(1, longest))]
        if rng.random() < 0.2:
            harness.add(prompt, SamplingParams(n=rng.randint(1, 3), max_tokens=rng.randint(1, 9)))
            continue
        params = draw_params(rng, widest, **fields)
        ends = frozenset(rng.sample(range(oracle.VOCAB), rng.choice([0, 1, 2, 4])))
        searches.append((harness.add(prompt, params, ends), params, ends))
        for _ in range(rng.randint(0, 3)):
            harness.step()
    harness.run()
    harness.assert_expected()
    for name, params, ends in searches:
        tracked = harness.requests[name]
        assert_found(tracked, beam_search(model(tracked.prompt, tracked.spec), params, ends))


@pytest.mark.parametrize("seed", range(40))
def test_a_search_finds_what_its_definition_finds_in_any_batch(seed: int) -> None:
    rng = random.Random(seed)
    check_batch(Harness(num_blocks=200, slots=20, budget=rng.choice([20, 23, 40])), rng, 16, 4, 9)


class Preempting(Harness):
    """Takes the cache away from one of the groups now and then, as if others needed it."""

    def __init__(self, rng: random.Random, **settings: Any) -> None:
        super().__init__(**settings)
        self.rng = rng

    def step(self) -> bool:
        residents = self.scheduler.residents
        if residents.running and (not residents.preemptions or self.rng.random() < 0.2):
            residents._preempt(self.rng.choice(list(residents.running.values())))
        return super().step()


@pytest.mark.parametrize("seed", range(40))
def test_preempted_searches_that_resume_in_pieces_find_the_same(seed: int) -> None:
    rng = random.Random(seed)
    harness = Preempting(rng, num_blocks=80, slots=16, budget=rng.choice([10, 14, 18]))
    check_batch(harness, rng, 6, 4, 5, max_tokens=rng.choice([6, 10]))
    assert harness.scheduler.residents.preemptions


@pytest.mark.parametrize("seed", range(30))
def test_stop_texts_end_hypotheses_from_min_tokens_on(seed: int) -> None:
    rng = random.Random(1000 + seed)
    harness = Harness(num_blocks=200, slots=16, budget=40)
    ends = frozenset(rng.sample(range(oracle.VOCAB), rng.choice([0, 1])))
    params = draw_params(rng, 12, min_tokens=rng.choice([0, 4]), max_tokens=rng.choice([4, 9, 14]))
    name = harness.add([1, 2, 3], params, ends, rules=Pairs())
    harness.run()
    tracked = harness.requests[name]
    expected = beam_search(model(tracked.prompt, tracked.spec), params, ends, Pairs.stops)
    assert_found(tracked, expected)
    for index, tokens in enumerate(tracked.tokens):
        stopped = tokens[-1] in ends or (Pairs.stops(tokens) and len(tokens) >= params.min_tokens)
        assert tracked.reasons[index] == ("stop" if stopped else "length")


@pytest.mark.parametrize("early_stopping", EARLY)
@pytest.mark.parametrize("length_penalty", PENALTIES)
def test_a_search_as_wide_as_the_tree_finds_the_best_of_all_outputs(
    monkeypatch: pytest.MonkeyPatch, length_penalty: float, early_stopping: Any
) -> None:
    vocab, longest, end = 4, 5, 3
    monkeypatch.setattr(oracle, "VOCAB", vocab)
    width = vocab * (vocab - 1) ** (longest - 1)
    harness = Harness(num_blocks=1200, slots=width, budget=400)
    name = harness.add(
        [1, 2, 0],
        BeamSearchParams(
            beam_width=width, n=width, length_penalty=length_penalty, early_stopping=early_stopping, max_tokens=longest
        ),
        frozenset([end]),
    )
    harness.run()
    tracked = harness.requests[name]
    logps = model(tracked.prompt, tracked.spec)
    outputs = []
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(vocab), repeat=length):
            if end not in tokens[:-1] and (tokens[-1] == end or length == longest):
                total = np.float32(0)
                for at, token in enumerate(tokens):
                    total += logps(list(tokens[:at]))[token]
                outputs.append(Hypothesis(total / np.float32(length**length_penalty), list(tokens)))
    assert_found(tracked, sorted(outputs, key=lambda output: -output.score)[:width])


@pytest.mark.parametrize("seed", range(20))
def test_what_all_outputs_share_is_delivered_as_soon_as_it_is_known(seed: int) -> None:
    rng = random.Random(2000 + seed)
    harness = Harness(num_blocks=200, slots=16, budget=40)
    params = draw_params(rng, 6, max_tokens=14, diversity_penalty=0.0)
    ends = frozenset(rng.sample(range(oracle.VOCAB), rng.choice([0, 1, 3])))
    name = harness.add([seed], params, ends)
    tracked = harness.requests[name]
    shared: list[list[int]] = []

    def watch(alive: list[list[int]]) -> None:
        same = [column[0] for column in zip(*alive, strict=False) if len(set(column)) == 1]
        apart = [len(set(column)) > 1 for column in zip(*alive, strict=False)]
        shared.append(same[: apart.index(True)] if True in apart else same)

    beam_search(model(tracked.prompt, tracked.spec), params, ends, watch=watch)
    for expected in shared[:-1]:
        assert harness.step() and not tracked.done
        assert tracked.tokens == [expected] * params.n
    assert harness.step() and tracked.done


@pytest.mark.parametrize("groups", [1, 2])
def test_only_beams_that_run_hold_blocks(groups: int) -> None:
    harness = Harness(num_blocks=100)
    name = harness.add([1], BeamSearchParams(beam_width=4, max_tokens=10, num_beam_groups=groups), frozenset([3]))
    group = harness.scheduler._by_id[name]
    while harness.step() and not harness.requests[name].done:
        assert group.live <= 4


def test_narrow_searches_do_share_tokens_before_they_end() -> None:
    harness = Listening(num_blocks=200, slots=16, budget=40)
    for seed in range(5):
        harness.add([seed], BeamSearchParams(beam_width=3, max_tokens=30))
    for _ in range(29):
        harness.step()
    assert sum(len(event.tokens) for event in harness.emitted) > 60


@pytest.mark.parametrize("groups", [1, 2])
def test_log_probs_ranks_and_top_tokens_are_those_of_each_token_in_its_place(groups: int) -> None:
    harness = Listening(num_blocks=40, slots=8, budget=24)
    params = BeamSearchParams(beam_width=4, n=4, max_tokens=12, logprobs=3, num_beam_groups=groups)
    name = harness.add([5, 6], params, frozenset([3]), rank=True)
    for prompt in range(4):
        harness.add([prompt] * 9, SamplingParams(n=2, max_tokens=20))
    harness.run()
    tracked = harness.requests[name]
    logps = model(tracked.prompt, tracked.spec)
    events = [event for event in harness.emitted if event.tops is not None]
    for index, tokens in enumerate(tracked.tokens):
        tops = [top for event in events if event.index == index for top in event.tops or ()]
        assert len(tops) == len(tokens)
        for at, (token, logp, top) in enumerate(zip(tokens, tracked.logps[index], tops, strict=True)):
            values = logps(tokens[:at])
            order = np.argsort(-values, kind="stable")
            assert np.float32(logp) == values[token]
            assert top.rank == order.tolist().index(token) + 1
            assert top.ids.tolist() == order[:3].tolist() and top.logps.tolist() == values[order[:3]].tolist()


@pytest.mark.parametrize("steps", range(13))
@pytest.mark.parametrize("groups", [1, 3])
def test_an_abort_after_any_step_leaves_nothing_behind(steps: int, groups: int) -> None:
    harness = Harness(num_blocks=34, slots=8, budget=16)
    for prompt in range(3):
        params = BeamSearchParams(beam_width=6, n=3, max_tokens=10, num_beam_groups=groups)
        harness.add([prompt] * (1 + 5 * prompt), params, frozenset([3]))
    for _ in range(steps):
        harness.step()
    for name in harness.requests:
        harness.abort(name)
        harness.scheduler.check()
    harness.run()


def test_fewer_outputs_than_asked_for_repeat_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "VOCAB", 3)
    for groups, possible in ((1, 5), (4, 4)):
        harness = Harness(slots=8)
        params = BeamSearchParams(beam_width=8, n=8, max_tokens=2, num_beam_groups=groups, diversity_penalty=float(groups > 1))
        name = harness.add([1], params, frozenset([0, 1]), extra={"vocab_size": 3})
        harness.run()
        tracked = harness.requests[name]
        expected = beam_search(model(tracked.prompt, tracked.spec), params, frozenset([0, 1]))
        assert_found(tracked, expected)
        assert len({tuple(tokens) for tokens in tracked.tokens}) == possible


@pytest.mark.parametrize("early_stopping", EARLY)
def test_a_width_of_one_is_greedy(early_stopping: Any) -> None:
    for seed in range(10):
        harness = Harness()
        params = BeamSearchParams(beam_width=1, max_tokens=12, early_stopping=early_stopping, length_penalty=2.0)
        search = harness.add([seed], params, frozenset([3, 4, 5]))
        greedy = harness.add([seed], SamplingParams(temperature=0, max_tokens=12), frozenset([3, 4, 5]))
        harness.run()
        assert harness.requests[search].tokens == harness.requests[greedy].tokens


@pytest.mark.parametrize("groups", [1, 2])
def test_the_trace_tells_how_each_output_came_about(groups: int) -> None:
    harness = Harness(num_blocks=100)
    params = BeamSearchParams(beam_width=4, n=4, max_tokens=8, num_beam_groups=groups, diversity_penalty=groups - 1.0, trace=True)
    name = harness.add([7], params, frozenset([2, 3]))
    strategy = harness.scheduler._by_id[name].strategy
    harness.run()
    tracked = harness.requests[name]
    steps: list[BeamStep] = strategy.trace()
    paths: list[list[int]] = []  # of the entries of the step before
    finished = []
    for number, step in enumerate(steps, 1):
        assert step.step == number
        assert step.fate.count("kept") <= 4 and step.group == sorted(step.group)
        before, cumulative = paths, steps[number - 2].cumulative
        paths = [[*(before[parent] if parent >= 0 else []), token] for parent, token in zip(step.parent, step.token, strict=True)]
        for parent, logprob, total in zip(step.parent, step.logprob, step.cumulative, strict=True):
            assert total == pytest.approx((cumulative[parent] if parent >= 0 else 0.0) + logprob, abs=1e-5)
            assert parent < 0 or steps[number - 2].fate[parent] == "kept"
        finished += [path for path, fate in zip(paths, step.fate, strict=True) if fate == "finished"]
    assert all(tokens in finished for tokens in tracked.tokens)


def test_a_trace_is_bounded_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_beam_trace, "_TRACED", 50)
    harness = Harness()
    name = harness.add([7], BeamSearchParams(beam_width=4, max_tokens=20, trace=True))
    strategy: Any = harness.scheduler._by_id[name].strategy
    harness.run()
    assert sum(len(step.token) for step in strategy.trace()) == 48 and not strategy.complete


def test_a_length_penalty_beyond_single_precision_is_refused() -> None:
    harness = Harness(num_blocks=200)
    with pytest.raises(ParameterError, match=r"length_penalty=30\.0 with outputs of up to 200 tokens"):
        harness.add([1], BeamSearchParams(length_penalty=30.0, max_tokens=200))

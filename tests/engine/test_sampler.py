"""The sampler reads what the pipeline by the book says, from state that forks, grows and is reused as sequences do."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from support.sampling import SLOTS, VOCAB, opened, opens, probe, random_batch, read, read_probe, rows

from pagefork.scheduler.plan import Forks, Kind, Probe, Spec, ints

pytestmark = pytest.mark.usefixtures("read_by")


def by_the_book(logits: np.ndarray, history: list[int], spec: dict[str, Any]) -> tuple[np.ndarray, book.Kept]:
    """Adjusted logits and what is kept of them."""
    x = book.adjusted(logits, history, spec["prompt_len"], spec)
    return x, book.kept(x, spec)


@pytest.mark.parametrize("seed", range(8))
def test_mixed_batches_replay_the_pipeline_row_by_row(seed: int) -> None:
    specs, histories, logits = random_batch(SLOTS, seed)
    sampler = opened([Spec(**spec) for spec in specs], histories, list(range(100, 100 + SLOTS)))
    position = [len(history) - 1 for history in histories]
    found = read(sampler, logits, list(range(SLOTS)), position)
    assert found.token is not None and found.logp is not None and found.rank is not None
    assert not found.bad.any()
    for i, (spec, history) in enumerate(zip(specs, histories, strict=True)):
        row = logits[i].numpy()
        x, kept = by_the_book(row, history, spec)
        token, margin = book.draw(kept.probs, book.uniform(spec["seed"], 100 + i, len(history)))
        if spec["temperature"] == 0:
            token = int(np.argmax(x))
        elif min(margin, kept.margin) < 1e-6:
            continue
        assert found.token[i] == token, (i, spec)
        logp = np.log(kept.probs[token]) if spec["processed"] else book.log_softmax(row)[token]
        assert abs(found.logp[i] - logp) < 2e-5
        order = x if spec["processed"] else row
        assert found.rank[i] == (1 + (order > order[token]).sum() if spec["rank"] else 0)
    assert torch.equal(sampler.last, torch.from_numpy(found.token).long())


@pytest.mark.parametrize("seed", range(3))
def test_a_row_alone_reads_the_same_bits(seed: int) -> None:
    specs, histories, logits = random_batch(SLOTS, 50 + seed)
    position = [len(history) - 1 for history in histories]
    built = [Spec(**spec) for spec in specs]
    together = read(opened(built, histories), logits, list(range(SLOTS)), position)
    slots = list(range(SLOTS))
    top, likely = (read(opened(built, histories), logits, slots, position, Kind.TOPN, 7, by_p) for by_p in (False, True))
    for i in range(SLOTS):
        alone = opened([built[i]], [histories[i]], [i])
        found = read(alone, logits[i : i + 1].clone(), [0], position[i : i + 1])
        for name in ("token", "logp", "rank", "bad"):
            assert getattr(found, name)[0] == getattr(together, name)[i]
        for all_rows, by_p, names in ((top, False, ()), (likely, True, ("top_p", "top_rank"))):
            one = opened([built[i]], [histories[i]], [i])
            found = read(one, logits[i : i + 1].clone(), [0], position[i : i + 1], Kind.TOPN, 7, by_p)
            for name in ("top_id", "top_logp", *names):
                alone_read = getattr(found, name)
                assert ((0 if alone_read is None else alone_read[0]) == getattr(all_rows, name)[i]).all()


@pytest.mark.parametrize("seed", range(4))
def test_top_entries_are_ordered_by_the_log_prob_that_is_reported(seed: int) -> None:
    specs, histories, logits = random_batch(SLOTS, 20 + seed)
    logits[::3] = logits[::3].round()  # ties
    sampler = opened([Spec(**spec) for spec in specs], histories)
    found = read(sampler, logits, list(range(SLOTS)), [len(history) - 1 for history in histories], Kind.TOPN, VOCAB + 2)
    assert found.top_id is not None and found.top_logp is not None and found.top_p is None
    assert found.top_id.shape == (SLOTS, VOCAB + 2)
    for values, padding in ((found.top_id, -1), (found.top_logp, -np.inf)):
        assert (values[:, VOCAB:] == padding).all()
    for i, (spec, history) in enumerate(zip(specs, histories, strict=True)):
        x, kept = by_the_book(logits[i].numpy(), history, spec)
        if kept.margin < 1e-6:
            continue
        with np.errstate(divide="ignore"):
            logp = np.log(kept.probs) if spec["processed"] else book.log_softmax(logits[i].numpy())
        values = np.where(kept.mask, x, -np.inf) if spec["processed"] else logits[i].numpy()
        ids = np.lexsort((np.arange(VOCAB), -values))
        assert (found.top_id[i, :VOCAB] == ids).all()
        np.testing.assert_allclose(found.top_logp[i, :VOCAB], logp[ids], atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [6, VOCAB + 2])
def test_the_most_probable_tokens_after_processing_are_those_that_may_be_drawn(seed: int, n: int) -> None:
    specs, histories, logits = random_batch(SLOTS, 60 + seed)
    logits[::3] = logits[::3].round()  # ties
    sampler = opened([Spec(**spec) for spec in specs], histories)
    position = [len(history) - 1 for history in histories]
    found = read(sampler, logits, list(range(SLOTS)), position, Kind.TOPN, n, processed=True)
    assert found.top_id is not None and found.top_logp is not None and found.top_p is not None and found.top_rank is not None
    for i, (spec, history) in enumerate(zip(specs, histories, strict=True)):
        row = logits[i].numpy()
        x, kept = by_the_book(row, history, spec)
        if kept.margin < 1e-6:
            continue
        values = np.where(kept.mask, x, -np.inf)
        ids = np.lexsort((np.arange(VOCAB), -values))[: min(n, kept.mask.sum())]
        assert (found.top_id[i, : len(ids)] == ids).all() and (found.top_id[i, len(ids) :] == -1).all()
        np.testing.assert_allclose(found.top_p[i, : len(ids)], kept.probs[ids], atol=1e-6, rtol=2e-5)
        logp = np.log(kept.probs[ids]) if spec["processed"] else book.log_softmax(row)[ids]
        np.testing.assert_allclose(found.top_logp[i, : len(ids)], logp, atol=2e-5)
        order = x if spec["processed"] else row
        ranks = [1 + (order > order[token]).sum() for token in ids] if spec["rank"] else [0] * len(ids)
        assert found.top_rank[i, : len(ids)].tolist() == ranks
        for values, padding in ((found.top_p, 0), (found.top_logp, -np.inf), (found.top_rank, 0)):
            assert (values[i, len(ids) :] == padding).all()


@pytest.mark.parametrize("chunk", [VOCAB, 10**9])
def test_top_after_sample_of_the_same_rows_reads_the_same_bits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAMPLE leaves its findings for TOPN; whether they are used must not show. Nor may they outlive the step."""
    monkeypatch.setattr("pagefork.kernels.scratch.CHUNK", chunk)
    specs, histories, logits = random_batch(SLOTS, 9)
    position = [len(history) - 1 for history in histories]
    built = [Spec(**{**spec, "temperature": spec["temperature"] or 0.9 * (i > 20)}) for i, spec in enumerate(specs)]
    shared = opened(built, histories)
    read(shared, logits, list(range(SLOTS)), position)
    sampled = [slot for slot, spec in enumerate(built) if spec.temperature > 0]
    assert 20 < len(sampled) < SLOTS
    every = list(range(SLOTS))
    for by_p, slots, ago in itertools.product((False, True), (sampled, sampled[::-2], every), (0, 1)):
        part, at = logits[slots], [max(0, position[slot] - ago) for slot in slots]
        expected = read(opened(built, histories), part, slots, at, Kind.TOPN, 9, by_p)
        found = read_probe(shared, logits, probe(Kind.TOPN, slots, 9, by_p), at, slots)
        for name in ("top_id", "top_logp", "bad", *(("top_p",) if by_p else ())):
            assert (getattr(found, name) == getattr(expected, name)).all()
    logits.neg_()
    shared.feed(*rows([], [], []))
    at = [position[slot] for slot in sampled]
    fresh = read(opened(built, histories), logits[sampled], sampled, at, Kind.TOPN, 9, True)
    found = read_probe(shared, logits, probe(Kind.TOPN, sampled, 9, True), at, sampled)
    assert (found.top_logp == fresh.top_logp).all() and (found.top_p == fresh.top_p).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_target_has_the_logprob_and_rank_that_drawing_it_would_report(seed: int) -> None:
    specs, histories, logits = random_batch(SLOTS, 90 + seed)
    built = [Spec(**{**spec, "rank": True}) for spec in specs]
    slots, position = list(range(SLOTS)), [len(history) - 1 for history in histories]
    drawn = read(opened(built, histories), logits, slots, position)
    assert drawn.token is not None and drawn.logp is not None and drawn.rank is not None
    top = read(opened(built, histories), logits, slots, position, Kind.TOPN, 5)
    wanted = Probe(Kind.TARGET, ints(slots), ints(slots), 5, target=drawn.token)
    found = read_probe(opened(built, histories), logits, wanted, position)
    assert found.logp is not None and found.rank is not None and not found.bad.any()
    assert (found.logp == drawn.logp).all() and (found.rank == drawn.rank).all()
    assert (found.top_id == top.top_id).all() and (found.top_logp == top.top_logp).all()
    assert sum(spec.processed for spec in built) > 3


@pytest.mark.parametrize("longer_life", [True, False])
def test_histories_fed_in_pieces_equal_histories_given_at_once(longer_life: bool) -> None:
    """Also when a token is fed twice at its position, and when a slot had a longer life before."""
    specs, histories, logits = random_batch(SLOTS, 77)
    histories = [history * 30 for history in histories]
    built = [Spec(**spec) for spec in specs]
    slots, position = list(range(SLOTS)), [len(history) - 1 for history in histories]
    expected = read(opened(built, histories), logits, slots, position)
    rng = np.random.default_rng(0)
    sampler = opened(built, [rng.integers(0, 6, 500 * longer_life).tolist() for _ in slots])
    known = [int(rng.integers(0, min(30, len(history)))) for history in histories]
    sampler.open(opens(slots, [history[:cut] for history, cut in zip(histories, known, strict=True)]), built)
    while any(cut < len(history) for cut, history in zip(known, histories, strict=True)):
        start = [max(0, cut - int(rng.integers(0, 3))) for cut in known]
        end = [min(len(history), cut + int(rng.integers(0, 60))) for cut, history in zip(known, histories, strict=True)]
        sampler.feed(*rows(slots, start, [history[a:b] for history, a, b in zip(histories, start, end, strict=True)]))
        known = [max(a, b) for a, b in zip(known, end, strict=True)]
    found = read(sampler, logits, slots, position)
    assert (found.token == expected.token).all() and (found.logp == expected.logp).all()
    earlier = [max(0, at - 5) for at in position]
    short = opened(built, [history[: at + 1] for history, at in zip(histories, earlier, strict=True)])
    assert (read(sampler, logits, slots, earlier).token == read(short, logits, slots, earlier).token).all()


def test_forks_copy_everything_but_the_stream_and_then_go_their_own_way() -> None:
    """Swaps included: every source is read before any slot is written."""
    specs, histories, logits = random_batch(20, 31)
    built = [Spec(**spec) for spec in specs]
    sampler = opened(built, histories)
    sampler.last[:20] = torch.arange(20)
    src, dst = list(range(20)), [1, 0, *range(20, 38)]
    streams = np.arange(500, 520)
    sampler.fork(Forks(ints(src), ints(dst), streams))
    assert sampler.last[dst].tolist() == src
    fed = [[7], [8], *([(9 + i) % VOCAB] for i in range(18))]
    position = [len(history) for history in histories]
    sampler.feed(*rows(dst, position, fed))
    found = read(sampler, logits, dst, position)
    fresh = opened(built, [history + more for history, more in zip(histories, fed, strict=True)], streams.tolist())
    expected = read(fresh, logits, list(range(20)), position)
    assert (found.token == expected.token).all() and (found.logp == expected.logp).all()
    if other := [i for i in range(2, 20) if position[i] > 0]:  # the parents did not notice
        at = [position[i] - 1 for i in other]
        again = read(opened(built, histories), logits[other], other, at)
        assert (read(sampler, logits[other], other, at).token == again.token).all()


def test_one_position_is_drawn_from_by_many_streams() -> None:
    spec = Spec(prompt_len=3, temperature=1.0, seed=5)
    sampler = opened([spec] * 30, [[]] * 30)
    logits = torch.zeros(2, VOCAB)
    logits[0, 1:] = -torch.inf
    found = read_probe(sampler, logits, probe(Kind.SAMPLE, list(range(30))), [2] * 30, [1] * 30)
    assert found.token is not None
    assert found.token.tolist() == [int(book.uniform(5, stream, 3) * VOCAB) for stream in range(30)]


def test_end_tokens_are_banned_until_min_tokens_are_generated() -> None:
    spec = Spec(prompt_len=4, min_tokens=3, end_ids=(6, 2))
    logits = torch.zeros(1, VOCAB)
    logits[0, 6], logits[0, 2], logits[0, 50] = 9, 8, 7
    sampler = opened([spec], [[]])
    tokens = [read(sampler, logits, [0], [position]).token for position in range(3, 9)]
    assert np.concatenate(tokens).tolist() == [50, 50, 50, 6, 6, 6]  # type: ignore[arg-type]


def test_greedy_reads_are_filtered_at_temperature_one() -> None:
    """TOPN of a greedy spec: temperature is taken as 1. SAMPLE: the argmax, with the model's or the filtered log-prob."""
    base = {"prompt_len": 1, "top_k": 4, "top_p": 0.9}
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(3))
    sampler = opened([Spec(**base), Spec(**base, processed=True)], [[], []])
    drawn = read(sampler, logits, [0, 1], [0, 0])
    top = read(sampler, logits, [0, 1], [0, 0], Kind.TOPN, 5, processed=True)
    assert drawn.token is not None and drawn.logp is not None and top.top_p is not None
    for i in range(2):
        kept = book.kept(logits[i].numpy(), {**base, "temperature": 1.0})
        assert drawn.token[i] == kept.probs.argmax()
        logp = np.log(kept.probs.max()) if i else book.log_softmax(logits[i].numpy()).max()
        assert abs(drawn.logp[i] - logp) < 2e-5
        np.testing.assert_allclose(top.top_p[i], np.sort(kept.probs)[::-1][:5], rtol=2e-5)


@pytest.mark.parametrize("greedy", [True, False])
def test_bad_rows_are_flagged_and_their_neighbours_do_not_notice(greedy: bool) -> None:
    specs, histories, logits = random_batch(SLOTS, 13)
    built = [Spec(**{**spec, "temperature": 0.0, "processed": False} if greedy else spec) for spec in specs]
    slots, position = list(range(SLOTS)), [len(history) - 1 for history in histories]
    spoiled = logits.clone()
    spoiled[4], spoiled[9], spoiled[20, 96] = torch.nan, -torch.inf, torch.nan
    usual, sampler = opened(built, histories), opened(built, histories)
    sampler.last[:] = 5
    bad = np.isin(np.arange(SLOTS), [4, 9, 20])
    for kind, n, by_p in ((Kind.SAMPLE, 0, False), (Kind.TOPN, 4, False), (Kind.TOPN, 4, True)):
        expected = read(usual, logits, slots, position, kind, n, by_p)
        found = read(sampler, spoiled, slots, position, kind, n, by_p)
        assert (found.bad == bad).all() and not expected.bad.any()
        for name in ("token", "logp", "rank", "top_id", "top_logp", "top_p"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or (one[~bad] == other[~bad]).all()
    assert (sampler.last[bad] == 0).all()
    hidden = opened([Spec(prompt_len=1, allowed_ids=(4,), temperature=0.0 if greedy else 1.0)], [[]])
    assert read(hidden, spoiled[20:21], [0], [0]).bad.all()
    nothing_left = opened([Spec(prompt_len=1, allowed_ids=(4,), bad_words=((4,),), temperature=0.0 if greedy else 1.0)], [[]])
    assert read(nothing_left, logits[:1], [0], [0]).bad.all()
    no_chance = read(nothing_left, logits[:1], [0], [0], Kind.TOPN, 2, processed=True)
    assert not no_chance.bad.any() and no_chance.top_id is not None and no_chance.top_id.tolist() == [[-1, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [64, 97])
def test_logits_of_any_type_are_read_and_not_modified(dtype: torch.dtype, vocab: int) -> None:
    stages = {"repetition_penalty": 1.2, "logit_bias": ((3, 1.0),), "bad_words": ((5,),)}
    spec = Spec(prompt_len=1, temperature=0.8, top_p=0.9, rank=True, **stages)  # type: ignore[arg-type]
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = logits.clone()
    histories = [[1, 2, 3]] * 6
    for kind, n in ((Kind.SAMPLE, 0), (Kind.TOPN, 3)):
        found = read(opened([spec] * 6, histories, vocab=vocab), logits, list(range(6)), [2] * 6, kind, n)
        expected = read(opened([spec] * 6, histories, vocab=vocab), logits.float(), list(range(6)), [2] * 6, kind, n)
        assert torch.equal(logits, before)
        for name in ("token", "logp", "rank", "top_id", "top_logp", "top_p"):
            if getattr(found, name) is not None:
                assert (getattr(found, name) == getattr(expected, name)).all()


def test_no_history_is_held_unless_a_spec_needs_it() -> None:
    sampler = opened([Spec(prompt_len=1, bad_words=((3,),))], [[]])
    sampler.feed(*rows([0], [0], [[1, 2, 3]]))
    assert sampler._state.history is None
    sampler.open(opens([1], [[1]]), [Spec(prompt_len=1, no_repeat_ngram_size=1)])
    assert sampler._state.history is not None


def test_what_can_not_be_read_is_an_error_that_says_so() -> None:
    sampler = opened([Spec(prompt_len=1)], [[]])
    with pytest.raises(ValueError, match=r"shape \[rows, 97\], not \[1, 98\]"):
        read(sampler, torch.zeros(1, VOCAB + 1), [0], [0])
    fields = (
        {"allowed_ids": (97,)},
        {"logit_bias": ((-1, 2.0),)},
        {"bad_words": ((3, 200),)},
        {"end_ids": (99,), "min_tokens": 1},
    )
    for field in fields:
        with pytest.raises(ValueError, match=r"is not in the vocabulary: ids are in \[0, 97\)"):
            opened([Spec(prompt_len=1, **field)], [[]])  # type: ignore[arg-type]

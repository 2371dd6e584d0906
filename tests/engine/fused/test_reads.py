"""Read-outs by the fused kernels find what those in torch find, of every kind and with every feature mixed in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.kernels import torch_reads
from support.sampling import opened, random_batch, read_probe, rows

from pagefork.scheduler.plan import Forks, Kind, Probe, Reads, Spec, ints

VOCAB, COUNT = 333, 6
GROUPS = ints([0, 1, 4, 4, COUNT])  # one of them is empty
EVERY = list(range(COUNT))
FIELDS = ("bad", "token", "rank", "top_id", "top_rank", "parent", "logp", "top_logp", "top_p", "score")


class Pair:
    """Two samplers with the same slots, of which one reads by the kernels and one in torch; and logits for them."""

    def __init__(self, seed: int, device: torch.device, **fields: Any) -> None:
        specs, histories, logits = random_batch(COUNT, seed, VOCAB)
        self.histories = [history[: fields.get("prompt_len")] for history in histories]
        logits[::3] = logits[::3].round()  # ties
        self.specs = [Spec(**{**spec, **fields}) for spec in specs]
        self.logits, self.position = logits.to(device), [len(history) - 1 for history in self.histories]
        self.fused = opened(self.specs, self.histories, vocab=VOCAB, device=device)
        with torch_reads():
            self.torch = opened(self.specs, self.histories, vocab=VOCAB, device=device)

    def agree(self, asked: Probe, row: Sequence[int] | None = None) -> Reads:
        """What both find: the same ids and ranks, log-probs within 2e-5."""
        at = [self.position[slot] for slot in asked.slot]
        assert self.fused._fused is not None and self.fused._fused.takes(asked) and self.torch._fused is None
        found, expected = (read_probe(sampler, self.logits, asked, at, row) for sampler in (self.fused, self.torch))
        assert found.why == expected.why
        for name in FIELDS:
            one, other = getattr(found, name), getattr(expected, name)
            if one is None or other is None:
                assert name == "top_rank" or one is other, name
                continue
            assert one.dtype == other.dtype and one.shape == other.shape, name
            good = ~expected.bad if len(one) == len(expected.bad) and name != "bad" else slice(None)
            np.testing.assert_allclose(one[good], other[good], atol=2e-5 * (one.dtype == np.float32), rtol=0, err_msg=name)
        return found


def asked(kind: Kind, slots: Sequence[int] = EVERY, n: int = 0, **fields: Any) -> Probe:
    return Probe(kind, ints(slots), ints(slots), n, **fields)


@pytest.mark.parametrize("seed", [1, 2])
def test_draws(seed: int, device: torch.device) -> None:
    pair = Pair(seed, device)
    found = pair.agree(asked(Kind.SAMPLE))
    assert found.token is not None and found.token.tolist() == pair.fused.last[:COUNT].tolist()


@pytest.mark.parametrize("processed", [False, True])
def test_best_tokens(processed: bool, device: torch.device) -> None:
    """Alone, after SAMPLE of the same entries, and of some of them."""
    pair = Pair(10, device)
    pair.agree(asked(Kind.TOPN, n=3, processed=processed))
    pair.agree(asked(Kind.SAMPLE))
    pair.agree(asked(Kind.TOPN, n=3, processed=processed))
    pair.agree(asked(Kind.TOPN, EVERY[::-2], 3, processed=processed), EVERY[::-2])


def test_best_tokens_of_entries_of_which_some_were_drawn_for(device: torch.device) -> None:
    """All at one position, so that it does not tell the others."""
    pair = Pair(10, device, prompt_len=1, top_p=1.0)
    pair.agree(asked(Kind.SAMPLE, EVERY[2:5]), EVERY[2:5])
    pair.agree(asked(Kind.TOPN, n=3, processed=True))


@pytest.mark.parametrize("processed", [False, True])
def test_pairs_of_searches(processed: bool, device: torch.device) -> None:
    pair = Pair(20, device)
    bias = np.random.default_rng(20).normal(size=COUNT).astype(np.float32) * 2 - 5
    pair.agree(asked(Kind.MERGE, n=7, groups=GROUPS, bias=bias, processed=processed))


def test_more_best_tokens_than_have_a_chance(device: torch.device) -> None:
    pair = Pair(12, device, rank=False)
    for processed in (False, True):
        pair.agree(asked(Kind.TOPN, n=128, processed=processed))


@pytest.mark.parametrize("n", [0, 5])
def test_given_tokens(n: int, device: torch.device) -> None:
    pair = Pair(
        30, device, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, no_repeat_ngram_size=0, bad_words=()
    )
    target = ints(np.random.default_rng(0).integers(0, VOCAB, COUNT))
    pair.agree(asked(Kind.TARGET, n=n, target=target))


def test_many_entries_of_one_row(device: torch.device) -> None:
    pair = Pair(40, device)
    pair.agree(asked(Kind.SAMPLE), [2] * COUNT)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_bad_rows(temperature: float, device: torch.device) -> None:
    pair = Pair(50, device, temperature=temperature, allowed_ids=None, top_p=1.0)
    pair.logits[1], pair.logits[3], pair.logits[5, 300] = torch.nan, -torch.inf, torch.nan
    for kind, n, processed in ((Kind.SAMPLE, 0, False), (Kind.TOPN, 4, False), (Kind.TOPN, 4, True)):
        found = pair.agree(asked(kind, n=n, processed=processed))
        assert found.bad.nonzero()[0].tolist() == [1, 3, 5]
    assert pair.fused.last[[1, 3, 5]].tolist() == [0, 0, 0]


def test_entries_of_which_processing_left_nothing(device: torch.device) -> None:
    pair = Pair(60, device, allowed_ids=(4,), bad_words=((4,),), temperature=1.0)
    assert len(pair.agree(asked(Kind.SAMPLE)).why) == COUNT
    pair.agree(asked(Kind.TOPN, n=3, processed=True))
    pair.agree(asked(Kind.TOPN, n=3))
    pair.agree(asked(Kind.MERGE, n=3, groups=GROUPS, bias=np.zeros(COUNT, np.float32)))


def test_slots_that_fork_and_are_fed(device: torch.device) -> None:
    """Swaps included, and tokens that are fed again as they were."""
    pair = Pair(70, device, repetition_penalty=1.3, frequency_penalty=0.4, no_repeat_ngram_size=2, top_p=1.0)
    rng = np.random.default_rng(1)
    known = pair.histories
    for step in range(2):
        forks = Forks(ints([0, 1, 3]), ints([1, 0, 5]), np.array([100, 200, 300]) + step)
        known[0], known[1], known[5] = known[1], known[0], list(known[3])
        fed = [history[len(history) - step % 2 :] + rng.integers(0, 6, rng.integers(1, 4)).tolist() for history in known]
        begin = [len(history) - step % 2 for history in known]
        known = [history[:at] + more for history, at, more in zip(known, begin, fed, strict=True)]
        given, tokens = rows(EVERY, begin, fed)
        for sampler in (pair.fused, pair.torch):
            sampler.fork(forks)
            sampler.feed(given, tokens.to(device))
        pair.position = [len(history) - 1 for history in known]
        pair.agree(asked(Kind.SAMPLE))

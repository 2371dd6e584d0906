"""Between two fetches the host waits for nothing: it launches what a step needs without a pause."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.sampling import opened, opens, random_batch, rows
from support.waiting import no_waiting

from pagefork.kernels.upload import upload
from pagefork.pending import Fetch, Pending
from pagefork.sampler import Sampler
from pagefork.scheduler.plan import Forks, Kind, Probe, Spec, ints

VOCAB, COUNT = 200, 6
EVERY, GROUPS, BIAS = ints(range(COUNT)), ints([0, 2, COUNT]), np.zeros(COUNT, np.float32)
PROBES = (
    Probe(Kind.SAMPLE, EVERY, EVERY),
    Probe(Kind.TOPN, EVERY, EVERY, 3),
    Probe(Kind.TOPN, EVERY[1:], EVERY[1:], 3, processed=True),
    Probe(Kind.MERGE, EVERY, EVERY, 4, groups=GROUPS, bias=BIAS),
    Probe(Kind.MERGE, EVERY, EVERY, 4, groups=GROUPS, bias=BIAS, processed=True),
    Probe(Kind.TARGET, EVERY[:2], EVERY[:2], 2, target=ints([5, 6])),
)


def step(sampler: Sampler, specs: list[Spec], logits: torch.Tensor, position: int) -> list[Pending]:
    """What a runner does in a step with a sampler."""
    sampler.fork(Forks(ints([0, 1]), ints([1, 0]), np.array([7, 8])))
    sampler.open(opens([COUNT - 1], [[1, 2, 3]]), specs[COUNT - 1 :])
    fed, tokens = rows(EVERY.tolist(), [position] * COUNT, [[3]] * COUNT)
    sampler.feed(fed, upload(tokens.numpy(), logits.device))
    at = np.full(COUNT, position)
    found = [sampler.read(logits, probe, np.arange(COUNT)[probe.at], at[probe.at]) for probe in PROBES]
    sampler.end_step()
    return found


def test_a_step_is_launched_without_waiting(device: torch.device) -> None:
    specs, histories, logits = random_batch(COUNT, 3, VOCAB)
    built = [Spec(**{**spec, "no_repeat_ngram_size": 2, "rank": True}) for spec in specs]
    for target in (0, 1):  # given tokens inside of prompts are read in torch where penalties count
        built[target] = Spec(prompt_len=1, temperature=0.7, top_p=0.8, processed=True, logit_bias=((3, 2.0),))
    sampler, logits = opened(built, histories, vocab=VOCAB, device=device), logits.to(device)
    Fetch(step(sampler, built, logits, 15), logits.device).reads()  # compiles kernels
    with no_waiting(device):
        fetch = Fetch(step(sampler, built, logits, 16), logits.device)
    assert [read.bad.any() for read in fetch.reads()] == [False] * len(PROBES)


def test_a_step_of_which_nothing_is_asked_is_waited_for(device: torch.device) -> None:
    """Its event comes after all that was launched before it."""
    with no_waiting(device):
        fetch = Fetch([], device)
    assert fetch.reads() == []


@pytest.mark.parametrize("ask", [lambda x: x.item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x.any())])
def test_waiting_is_noticed(ask: object, device: torch.device) -> None:
    with pytest.raises((AssertionError, RuntimeError)), no_waiting(device):
        ask(torch.ones(1, device=device))  # type: ignore[operator]

"""Steps before the first request, so that none of a request waits for a compiler.

Triton compiles a kernel when it is first launched, which takes seconds, and CUDA loads a library's kernels when they are first
called. The steps here launch, through the runner that will serve,

- prompts as a whole and in part, short and long ones, and decoding of one and of all sequences behind short contexts, long
  ones and a context that they share, alone and beside prompts;
- draws that are greedy, unfiltered, filtered, adjusted by every kind of ban, bias and penalty, both, and ranked;
- the 1, 5 and 20 most probable tokens, with a draw and alone, by log-prob and by processed probability; similarity to
  earlier positions where the cache has hidden states; the merge of a search; log-probs of a prompt;
- forks of slots and copies of blocks.

What is rare is compiled when it first occurs: other numbers of most probable tokens, logits processors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pagefork.scheduler.plan import Kind, Plan, Probe, Runner, Spec, ints

from .cache import KVCache
from .config import EngineConfig
from .dummy_steps import DUMMY_BLOCKS, DummySteps, Span, draws, ends, run

_GREEDY = Spec(prompt_len=1)
_DRAWN = Spec(prompt_len=1, temperature=0.8)
_ADJUSTED: dict[str, object] = {
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "no_repeat_ngram_size": 3,
    "min_tokens": 1 << 30,
    "end_ids": (0,),
    "bad_words": ((0,), (1, 0)),
    "logit_bias": ((0, 1.0),),
}
_FILTERED: dict[str, object] = {"top_k": 20, "top_p": 0.9, "min_p": 0.01}
_SPECS = [
    _GREEDY,
    _DRAWN,
    *(
        Spec(prompt_len=1, temperature=0.8, **kind)  # type: ignore[arg-type]
        for kind in (_FILTERED, _ADJUSTED, _FILTERED | _ADJUSTED, _FILTERED | {"rank": True, "processed": True})
    ),
]
_SHORT, _LONG, _CHUNK = 8, 1000, 200  # tokens: two contexts, and a part of a prompt
_FEW = 4  # sequences of a search


def warm_up(runner: Runner, cache: KVCache, config: EngineConfig, max_len: int) -> None:
    """Runs the steps. Afterwards blocks hold what means nothing, as fresh ones do, and slots are as if nothing had been.

    cache: that of the runner. max_len: tokens of a sequence.
    """
    blocks = min(cache.num_blocks, DUMMY_BLOCKS)
    cache.zero(blocks)
    steps = DummySteps(blocks, cache.block_size, config.max_num_seqs, config.max_num_batched_tokens, max_len)
    for plan in _plans(steps, cache.hidden is not None):
        run(runner, plan)


def _plans(steps: DummySteps, hidden_states: bool) -> Iterator[Plan]:
    every, few = steps.decoding(_SHORT), steps.decoding(_SHORT, _FEW)
    for spans in _shapes(steps):
        yield steps.plan(spans, _DRAWN)
    yield steps.plan(steps.decoding(_LONG), _DRAWN, trunk=True)
    for spec in _SPECS:
        yield steps.plan(every, spec)
    for probes in _reads(few, hidden_states):
        for spec in (_GREEDY, _SPECS[-1]):
            yield steps.plan(few, spec, probes)
    prompt = [Span(0, min(_SHORT, steps.max_len, steps.max_tokens))]
    yield steps.plan(prompt, _DRAWN, [_scored(prompt[0])])
    if steps.max_num_seqs > 1 and steps.num_blocks > 2:
        yield steps.plan(few, _DRAWN, forks=True)
    yield steps.plan(every, _GREEDY)  # no slot keeps a row of the token table


def _shapes(steps: DummySteps) -> Iterator[list[Span]]:
    """Rows of steps, by what they have."""
    whole = min(steps.max_tokens, steps.max_len)
    part = min(_CHUNK, steps.max_len, steps.max_tokens // 2)
    chunk = Span(steps.max_len - part, part)
    yield [Span(0, min(_SHORT, whole))]
    yield [Span(0, whole)]
    yield [chunk]
    for start in (0, _SHORT, _LONG):
        yield steps.decoding(start, 1)
        yield steps.decoding(start)
    if others := min(steps.max_num_seqs - 1, steps.max_tokens - part):
        yield [chunk, *steps.decoding(_LONG, others)]


def _reads(spans: list[Span], hidden_states: bool) -> Iterator[list[Probe]]:
    """What is read besides draws, of the last tokens of rows."""
    at, slot = ends(spans)
    for n in (1, 5, 20):
        yield [draws(spans), Probe(Kind.TOPN, at, slot, n)]
        yield [Probe(Kind.TOPN, at, slot, n)]
        yield [Probe(Kind.TOPN, at, slot, n, processed=True, window=np.zeros_like(slot) if hidden_states else None)]
    bias = np.zeros(len(spans), np.float32)
    for processed in (False, True):
        yield [Probe(Kind.MERGE, at, slot, 2 * len(spans), processed, groups=ints([0, len(spans)]), bias=bias)]


def _scored(span: Span) -> Probe:
    at = ints(range(span.length))
    return Probe(Kind.TARGET, at, np.zeros_like(at), 1, target=np.zeros_like(at))

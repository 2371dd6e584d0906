"""What must hold on every device: the same tokens, the same bits, no leak."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pagefork import LLM, CompletionOutput, LLMEngine, RequestOutput, SamplingParams
from pagefork.prompts import Prompt
from pagefork.scheduler.params import CommonParams
from support.strategies import STRATEGIES

CLOSE = 1e-5  # of two log-probs: other devices may take either token
Bits = list[list[dict[int, float]]]


@contextmanager
def engine(model: str, **settings: Any) -> Iterator[LLM]:
    """In fp32 with a cache of some blocks unless told otherwise; its memory is free again afterwards."""
    llm = LLM(model, **{"dtype": "float32", "num_blocks": 1000, "max_num_seqs": 64, **settings})
    yield llm
    llm.engine.check()
    del llm
    free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generated(llm: LLM, prompts: Sequence[Prompt], params: Sequence[CommonParams]) -> list[list[CompletionOutput]]:
    """The outputs of each request, all in one batch."""
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    assert not [output.error for output in outputs if output.error]
    return [output.outputs for output in outputs]


def tokens(outputs: Sequence[Sequence[CompletionOutput]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in request] for request in outputs]


def excused(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: Sequence[CommonParams],
    found: Sequence[Sequence[CompletionOutput]],
    expected: Sequence[Sequence[CompletionOutput]],
) -> int:
    """How many outputs differ, each from a place on where `llm` holds both tokens, or both outputs, for equally good.

    Fails where one differs for another reason.
    """
    count = 0
    for prompt, one, got, wanted in zip(prompts, params, found, expected, strict=True):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            if a.token_ids != b.token_ids:
                margin = _margin(llm, prompt, a, b)
                assert margin < CLOSE, f"{one}: {a.token_ids} is not {b.token_ids}, by a margin of {margin}"
                count += 1
    return count


def _margin(llm: LLM, prompt: Sequence[int], a: CompletionOutput, b: CompletionOutput) -> float:
    """By how much one is better: the scores of a search, else the log-probs of the first tokens that differ."""
    if a.score is not None and b.score is not None:
        return abs(a.score - b.score)
    same = next(
        (at for at, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y),
        min(len(a.token_ids), len(b.token_ids)),
    )
    if same == min(len(a.token_ids), len(b.token_ids)):
        return float("inf")  # one ended earlier
    read = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True)
    [[output]] = generated(llm, [[*prompt, *a.token_ids[:same]]], [read])
    assert output.logprobs is not None
    [logprobs] = output.logprobs
    return abs(logprobs[a.token_ids[same]].logprob - logprobs[b.token_ids[same]].logprob)


def bits(llm: LLM, prompts: Sequence[Sequence[int]], new: int, together: int, crowd: Sequence[Sequence[int]] = ()) -> Bits:
    """Log-probs of the whole vocabulary at every token, of prompts that run so many at a time, in a crowd of others."""
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=new, ignore_eos=True, logprobs=-1)
    found: Bits = []
    for begin in range(0, len(prompts), together):
        part = prompts[begin : begin + together]
        others = [SamplingParams(seed=9, max_tokens=new + index % 5, ignore_eos=True) for index in range(len(crowd))]
        for [output] in generated(llm, [*part, *crowd], [*[params] * len(part), *others])[: len(part)]:
            found.append([{token: entry.logprob for token, entry in at.items()} for at in output.logprobs or []])
    return found


class Soak:
    """Requests of all kinds that come and go, of which some are aborted, in a cache that is too small for them."""

    def __init__(
        self,
        llm: LLMEngine,
        vocab: int,
        kinds: Sequence[str] = tuple(STRATEGIES),
        longest: int = 48,
        new: int = 16,
        alive: int = 24,
    ) -> None:
        """Prompts of up to 4/3 `longest` tokens, outputs of up to `new`, `alive` requests at a time, of these strategies."""
        self._llm, self._vocab, self._new, self._alive = llm, vocab, new, alive
        self._random, self._kinds = random.Random(0), kinds
        self._prefixes = [self._tokens(longest) for _ in range(3)]
        self._running: set[str] = set()
        self.ended: dict[str, int] = {}  # finish reasons
        self._count = 0

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(3, self._vocab) for _ in range(count)]

    def _add(self) -> None:
        prefix = self._random.choice(self._prefixes)
        prompt = prefix[: self._random.randrange(len(prefix))] + self._tokens(self._random.randint(1, len(prefix) // 3))
        kind = self._random.choice(self._kinds)
        extra: dict[str, Any] = {"max_tokens": self._random.randint(1, self._new)}
        if self._random.random() < 0.3:
            extra |= {"frequency_penalty": 0.4, "no_repeat_ngram_size": 3, "logprobs": 2}
        name = str(self._count)
        self._count += 1
        self._llm.add_request(name, prompt, STRATEGIES[kind](**extra))
        self._running.add(name)

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            assert output.error is None, output.error
            if output.finished:
                self._running.remove(output.request_id)
                reason = str(output.outputs[0].finish_reason)
                self.ended[reason] = self.ended.get(reason, 0) + 1

    def run(self, seconds: float, steps: int) -> None:
        """Until the time is over, but so many steps at least; then what runs ends, and every block is free."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or steps > 0:
            steps -= 1
            while len(self._running) < self._alive:
                self._add()
            if self._random.random() < 0.05:
                self._llm.abort_request(self._random.choice(sorted(self._running)))
            self._take(self._llm.step())
        while self._llm.has_unfinished_requests():
            self._take(self._llm.step())
        self._llm.check()
        stats = self._llm.stats()
        assert not self._running
        assert stats.free_blocks == stats.num_blocks and not stats.num_running and not stats.num_waiting


def soak(llm: LLMEngine, vocab: int, seconds: float, steps: int = 100, **load: Any) -> Mapping[str, int]:
    """Runs for some seconds, and twice so many steps at least; how requests ended.

    Fails where the memory of the device grows after the first third.
    """
    work = Soak(llm, vocab, **load)
    work.run(seconds / 3, steps)
    before = _allocated()
    work.run(2 * seconds / 3, steps)
    assert _allocated() <= before + (1 << 20), "memory of the device is not given back"
    assert llm.stats().preemptions > 0, "the cache was not too small after all"
    return work.ended


def _allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

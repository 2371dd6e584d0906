"""An engine on random weights, and how the steps of requests that run together are timed."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_models import outline, token_bytes, weight_bytes

from pagefork import EngineConfig, LLMEngine
from pagefork.runner import ModelRunner
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.scheduler import Scheduler

HOST = ((Scheduler, "schedule"), (ModelRunner, "submit"), (ModelRunner, "collect"), (Scheduler, "apply"))
ROUNDS = 5  # of which the median counts


class Sizes(NamedTuple):
    """How large the cases are."""

    sequences: int = 256  # most that run at once
    wide: int = 4096  # beams of one search
    length: int = 4608  # most tokens of a sequence
    budget: int = 8192  # tokens of a step
    prompt: int = 512
    prefix: int = 4096
    steps: int = 24  # of a round
    warm: int = 8  # tokens of each sequence before the first round
    load: tuple[int, int] = (100, 1024)  # fewest and most tokens of a prompt and of an output, as in nano-vllm's benchmark
    beam_prompt: int = 128
    beam_tokens: int = 128
    product: int = 8192  # rows and columns of the matrices whose product is the limit
    copied: int = 1 << 30  # bytes


TINY = Sizes(16, 12, 128, 64, 20, 40, 2, 2, (4, 12), 8, 4, 64, 1 << 16)


class Bench:
    """A model and a device, and at most one engine on them at a time."""

    def __init__(self, directory: Path, device: torch.device, sizes: Sizes, dtype: torch.dtype) -> None:
        self.directory, self.device, self.sizes, self.dtype = directory, device, sizes, dtype
        self.config = outline(directory)
        self.bytes_per_s = 2 * sizes.copied / self._copy()
        self.flops_per_s = 2 * sizes.product**3 / self._product()
        self._made: tuple[dict[str, Any], LLMEngine] | None = None

    def engine(self, **settings: Any) -> LLMEngine:
        """With these settings and else its own; the one before it is gone, unless it has the same."""
        sizes = self.sizes
        given = {
            "max_num_seqs": sizes.sequences,
            "max_num_batched_tokens": sizes.budget,
            "max_model_len": sizes.length,
            "enable_prefix_caching": False,
            **settings,
        }
        if self._made is None or self._made[0] != given:
            self.drop()
            dtype = str(self.dtype).removeprefix("torch.")
            config = EngineConfig(model=str(self.directory), device=self.device.type, dtype=dtype, **given)  # type: ignore[arg-type]
            self._made = given, LLMEngine(config)
        return self._made[1]

    def drop(self) -> None:
        self._made = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [[random.randrange(3, self.config.vocab_size) for _ in range(length)] for _ in range(count)]

    def read_ms(self, tokens: float) -> float:
        """The least time of a step that reads the weights and the keys and values of so many tokens."""
        return 1000 * (weight_bytes(self.config, self.dtype) + tokens * token_bytes(self.config, self.dtype)) / self.bytes_per_s

    def _copy(self) -> float:
        source, target = (torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device) for _ in range(2))
        return self._seconds(lambda: target.copy_(source))

    def _product(self) -> float:
        size = self.sizes.product
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        return self._seconds(lambda: a @ b)

    def _seconds(self, call: Callable[[], object]) -> float:
        """The median over rounds of a few calls each."""
        calls, times = 4, []
        for _ in range(ROUNDS + 1):
            self.wait()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            self.wait()
            times.append((time.perf_counter() - begin) / calls)
        return statistics.median(times[1:])


class Flow:
    """Requests that run together, and how many tokens each has."""

    def __init__(self, engine: LLMEngine, prompts: Sequence[list[int]], params: Sequence[CommonParams]) -> None:
        self._engine = engine
        self.tokens = {str(index): 0 for index in range(len(prompts))}
        self._given = sum(map(len, prompts))
        for name, prompt, one in zip(self.tokens, prompts, params, strict=True):
            engine.add_request(name, prompt, one)

    def step(self) -> None:
        """Raises RuntimeError where a request failed."""
        for output in self._engine.step():
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id} failed: {output.error}")
            self.tokens[output.request_id] = sum(len(completion.token_ids) for completion in output.outputs)

    def finish(self) -> float:
        """Seconds until all are done."""
        begin = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self.step()
        return time.perf_counter() - begin

    def rounds(self, sequences: int, warm: int, steps: int) -> tuple[float, int, dict[str, float]]:
        """Milliseconds of a step in which each of so many sequences grows by a token, the tokens that they then have
        altogether, prompts counted once, and the milliseconds of each part of a step on the host.

        Raises RuntimeError if they do not all grow; in the first and the last step other numbers may come.
        """
        each = sequences // len(self.tokens)
        while min(self.tokens.values()) < warm * each:
            self.step()
        before, times = sum(self.tokens.values()), []
        with host_times() as host:
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                for _ in range(steps):
                    self.step()
                times.append((time.perf_counter() - begin) / steps)
        grown = sum(self.tokens.values()) - before
        if abs(grown - ROUNDS * steps * sequences) > 2 * sequences:
            raise RuntimeError(f"{sequences} sequences grew by {grown} tokens in {ROUNDS * steps} steps")
        context = self._given + before + grown // 2
        return 1000 * statistics.median(times), context, {name: 1000 * spent / (ROUNDS * steps) for name, spent in host.items()}

    def stop(self) -> None:
        for name in self.tokens:
            self._engine.abort_request(name)
        while self._engine.has_unfinished_requests():
            self._engine.step()


@contextmanager
def host_times() -> Iterator[dict[str, float]]:
    """Seconds spent in what the host does in a step; `collect` holds the waiting for the device."""
    spent = {name: 0.0 for _, name in HOST}
    originals = [(owner, name, getattr(owner, name)) for owner, name in HOST]

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **fields: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **fields)
            finally:
                spent[name] += time.perf_counter() - begin

        return call

    try:
        for owner, name, original in originals:
            setattr(owner, name, timed(name, original))
        yield spent
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)

"""What the engine returns. Outputs are cumulative: each one holds everything generated so far."""

from __future__ import annotations

import msgspec

from pagefork.scheduler.accounting import Trace
from pagefork.scheduler.errors import PageforkError


class Logprob(msgspec.Struct, frozen=True):
    """The log-prob of one token, its rank (1 is the most probable) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One output of a request.

    finish_reason: None while it runs, then "stop" (an end token or a stop text; `stop_reason` says which, None
    for the model's own end token), "length", "abort" or "error" (the request's `error` says why).
    """

    index: int
    text: str = ""
    token_ids: list[int] = []
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    score: float | None = None


class RequestMetrics(msgspec.Struct, kw_only=True):
    """Times are seconds of time.monotonic().

    What the request cost is known with the last output. cached_tokens: of its prompt, found in the prefix cache.
    preemptions: how often it lost its blocks to others and began again. forward_tokens: tokens computed for it, recomputed
    ones too. forks: sequences that began as copies of others. blocks_copied: blocks copied on write. blocks_freed: blocks
    that its sequences let go while it ran. shared_block_ratio: of the blocks that its sequences would have held if none
    shared, the part that was not needed, at the moment when they would have held the most.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    forward_tokens: int = 0
    forks: int = 0
    blocks_copied: int = 0
    blocks_freed: int = 0
    shared_block_ratio: float = 0.0


class RequestOutput(msgspec.Struct, kw_only=True):
    """Everything known of one request. `error` is set when `finish_reason` is "error".

    prompt_logprobs: per prompt token, as CompletionOutput.logprobs; None for the first, which nothing precedes.
    trace: how the outputs came about, in the last output of a request that asked for it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    trace: Trace | None = None
    error: PageforkError | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of the engine. `free_blocks` counts the cached blocks that nobody refers to, too.

    live_sequences: that hold blocks, of all groups. shared_block_ratio: of the blocks that they would hold if none shared,
    the part that is not needed.
    """

    num_blocks: int
    free_blocks: int
    cached_blocks: int
    shared_block_ratio: float
    num_running: int
    num_waiting: int
    live_sequences: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    forward_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    forks: int
    blocks_copied: int

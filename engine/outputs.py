"""What the engine returns. Outputs are cumulative: each one holds everything generated so far."""

from __future__ import annotations

import msgspec

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
    """Times are seconds of time.monotonic(); counts are tokens."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0


class RequestOutput(msgspec.Struct, kw_only=True):
    """Everything known of one request. `error` is set when `finish_reason` is "error".

    prompt_logprobs: per prompt token, as CompletionOutput.logprobs; None for the first, which nothing precedes.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    error: PageforkError | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of the engine. `free_blocks` counts the cached blocks that nobody refers to."""

    num_blocks: int
    free_blocks: int
    cached_blocks: int
    num_running: int
    num_waiting: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    forward_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    forks: int
    blocks_copied: int

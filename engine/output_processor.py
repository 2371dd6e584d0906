"""From the scheduler's updates to RequestOutputs: text, log-probs, finish reasons."""

from __future__ import annotations

import time
from functools import cached_property

import msgspec

from pagefork.scheduler.accounting import Usage
from pagefork.scheduler.edits import Update
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.request import Request
from pagefork.scheduler.scoring import Scored
from pagefork.scheduler.strategies.base import Emit, Finish, Top

from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from .text_rules import first_stop, held_back
from .tokenizer import DetokState, Tokenizer


class Pieces:
    """The texts of single tokens for tables of log-probs, each decoded once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}

    def logprobs(self, token: int, logp: float, top: Top) -> dict[int, Logprob]:
        """The chosen token first, then the most probable ones."""
        table = {token: Logprob(logp, top.rank or None, self._text(token))}
        for rank, (other, value) in enumerate(zip(top.ids.tolist(), top.logps.tolist(), strict=True), 1):
            if other >= 0 and other not in table:
                table[other] = Logprob(value, rank, self._text(other))
        return table

    def _text(self, token: int) -> str | None:
        if self.tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return self._texts[token]


class _Stream:
    """One output under way. `text` is decoded; what could begin a stop text is not shown yet."""

    def __init__(self, index: int, params: CommonParams, pieces: Pieces) -> None:
        self.index = index
        self._params = params
        self._pieces = pieces
        self._tokenizer = pieces.tokenizer
        self._detok = DetokState()
        self._text = ""
        self._immune = 0  # stop texts within so many characters came before min_tokens and end nothing
        self._count = 0
        self._tokens: list[int] = []
        self._cumulative = 0.0
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._finish: Finish | None = None

    def emit(self, event: Emit) -> None:
        self._tokens += event.tokens
        self._cumulative += sum(event.logps)
        if self._tokenizer is not None:
            for token in event.tokens:
                self._detok, text = self._tokenizer.step(self._detok, token, self._params.skip_special_tokens)
                self._text += text
                self._count += 1
                if self._count < self._params.min_tokens:
                    self._immune = len(self._text)
        if self._logprobs is not None and event.tops is not None:
            self._logprobs += map(self._pieces.logprobs, event.tokens, event.logps, event.tops)

    def finish(self, event: Finish) -> None:
        self._finish = event
        if self._tokenizer is not None:
            self._text += self._tokenizer.rest(self._detok, self._params.skip_special_tokens)
        found = first_stop(self._text, self._params.stop, self._immune) if isinstance(event.stop_reason, str) else None
        if found is not None:
            start, stop = found
            self._text = self._text[: start + (len(stop) if self._params.include_stop_str_in_output else 0)]

    def output(self) -> CompletionOutput:
        finish = self._finish
        shown = self._text
        if finish is None and self._params.stop and not self._params.include_stop_str_in_output:
            shown = shown[: len(shown) - held_back(shown, self._params.stop)]
        return CompletionOutput(
            index=self.index,
            text=shown,
            token_ids=self._tokens.copy(),
            cumulative_logprob=self._cumulative,
            logprobs=None if self._logprobs is None else self._logprobs.copy(),
            finish_reason=finish.reason if finish else None,
            stop_reason=finish.stop_reason if finish else None,
            score=finish.score if finish else None,
        )


class _PromptLogprobs:
    """Log-probs of the prompt's tokens, as far as they are known."""

    def __init__(self, request: Request, pieces: Pieces) -> None:
        self._ids = request.prompt.tolist()
        self._pieces = pieces
        self._entries: list[dict[int, Logprob] | None] = [None]

    def add(self, scored: Scored) -> None:
        tokens = self._ids[scored.begin : scored.begin + len(scored.logps)]
        tops = map(Top, scored.ranks, scored.top_ids, scored.top_logps)
        self._entries += map(self._pieces.logprobs, tokens, scored.logps, tops)

    def entries(self) -> list[dict[int, Logprob] | None]:
        """A list that does not change any more."""
        return self._entries if len(self._entries) == len(self._ids) else self._entries.copy()


class OutputProcessor:
    """Turns the updates of one request into cumulative RequestOutputs."""

    def __init__(self, request: Request, prompt: str | None, outputs: int, pieces: Pieces) -> None:
        self.request = request
        self._prompt = prompt
        self._streams = [_Stream(index, request.params, pieces) for index in range(outputs)]
        self._prompt_logprobs = None if request.prompt_logprobs is None else _PromptLogprobs(request, pieces)
        self._metrics = RequestMetrics(arrival_time=time.monotonic())

    @cached_property
    def _ids(self) -> list[int]:
        """The prompt, for outputs. A request that waits does without: as a list it takes nine times the memory of its array."""
        ids: list[int] = self.request.prompt.tolist()
        return ids

    def process(self, update: Update) -> RequestOutput:
        """The request's output after an update."""
        for event in update.events:
            if isinstance(event, Emit):
                self._streams[event.index].emit(event)
            else:
                self._streams[event.index].finish(event)
        if self._prompt_logprobs is not None:
            for scored in update.scores:
                self._prompt_logprobs.add(scored)
        now = time.monotonic()
        if self._metrics.first_token_time is None and any(isinstance(event, Emit) for event in update.events):
            self._metrics.first_token_time = now
        if update.done:
            self._metrics.finished_time = now
            self._metrics.cached_tokens, self._metrics.preemptions = update.cached_tokens, update.preemptions
            if update.usage is not None:
                self._count(update.usage)
        return RequestOutput(
            request_id=update.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._ids,
            prompt_logprobs=None if self._prompt_logprobs is None else self._prompt_logprobs.entries(),
            outputs=[stream.output() for stream in self._streams],
            finished=update.done,
            metrics=msgspec.structs.replace(self._metrics),
            trace=update.trace,
            error=update.error,
        )

    def _count(self, usage: Usage) -> None:
        metrics = self._metrics
        metrics.forward_tokens, metrics.forks = usage.forward_tokens, usage.forks
        metrics.blocks_copied, metrics.blocks_freed = usage.blocks_copied, usage.blocks_freed
        metrics.shared_block_ratio = usage.shared_block_ratio

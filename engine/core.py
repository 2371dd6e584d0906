"""LLMEngine: requests in, cumulative outputs out, one step at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from pagefork.scheduler.edits import Update
from pagefork.scheduler.errors import ConfigError, EngineMisuseError, ValueFunctionError
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.request import Request
from pagefork.scheduler.scheduler import Scheduler

from .admission import Admission
from .asking import Answer, Asking
from .build import Built, build
from .config import EngineConfig
from .generation_config import default_params
from .interrupts import interrupt_deferred
from .output_processor import OutputProcessor, Pieces
from .outputs import EngineStats, RequestOutput
from .overlap import runner_for
from .prompts import Prompt
from .value_functions import VALUE_FUNCTIONS, MakesValueFunction

logger = logging.getLogger("pagefork")

T = TypeVar("T")

_PATIENCE = 0.01  # seconds that a step with nothing to compute waits for an answer; its caller has other things to do


class LLMEngine:
    """A model, its cache and a scheduler. Not thread-safe: the thread that steps first owns it; misuse raises.

    Raises ModelError for a checkpoint that can't be loaded, ConfigError for settings that don't go together.
    """

    def __init__(self, config: EngineConfig, value_functions: Mapping[str, MakesValueFunction] | None = None) -> None:
        """`value_functions`: further ones that parameters can name; each takes a prompt's text and returns a value function."""
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"LLMEngine takes an EngineConfig, got {type(config).__name__}")
        self.config = config
        self._built: Built = build(config)
        self.tokenizer = self._built.tokenizer
        self.max_model_len = self._built.max_model_len
        self._runner = runner_for(self._built.runner, self._built.overlap, self._built.cache.device)
        self._scheduler = Scheduler(
            num_blocks=self._built.cache.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            lag=int(self._built.overlap),
        )
        self._admission = Admission(
            self._built.model.config,
            self._built.first_token,
            self.tokenizer,
            self.max_model_len,
            config.seed,
            has_hidden_states=self._built.cache.hidden is not None,
            value_functions={**VALUE_FUNCTIONS, **(value_functions or {})},
        )
        self.prompts = self._admission.prompts
        self._asking = Asking()
        self._pieces = Pieces(self.tokenizer)
        self._processors: dict[str, OutputProcessor] = {}
        self._undelivered: list[RequestOutput] = []
        self._owner: threading.Thread | None = None
        self._stepping = False

    def add_request(self, request_id: str, prompt: Prompt, params: CommonParams, priority: int = 0) -> None:
        """Queue a prompt (text or token ids). Raises InvalidRequestError; the engine is unchanged then."""
        self.queue(self.prepare(request_id, prompt, params, priority), prompt if isinstance(prompt, str) else None)

    def prepare(self, request_id: str, prompt: Prompt, params: CommonParams, priority: int = 0) -> Request:
        """Check and tokenise a request without queueing it. Raises InvalidRequestError."""
        self._enter()
        request = self._admission.request(request_id, prompt, params, priority)
        self._scheduler.validate(request)
        return request

    def queue(self, request: Request, text: str | None = None) -> None:
        """Queue a prepared request."""
        self._enter()
        outputs = self._scheduler.add(request)
        self._processors[request.id] = OutputProcessor(request, text, outputs, self._pieces)
        if request.params.logits_processors:
            self._runner.processors.register(request.spec.processors, len(request.prompt), request.params.logits_processors)

    def abort_request(self, request_id: str) -> None:
        """End a request now; its output with finish_reason "abort" comes with the next step. Unknown ids are ignored."""
        self._enter()
        update = self._scheduler.abort(request_id)
        if update is not None:
            self._deliver(update)

    def discard(self, request_ids: Iterable[str]) -> None:
        """Abort requests whose outputs nobody waits for any more."""
        gone = set(request_ids)
        for request_id in gone:
            self.abort_request(request_id)
        self._undelivered = [output for output in self._undelivered if output.request_id not in gone]

    def redeliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Outputs that were taken from step() by someone they were not for; the next step gives them again."""
        self._undelivered += outputs

    @cached_property
    def _default_params(self) -> CommonParams:  # once, for its warning
        return default_params(self._built.generation)

    def default_params(self) -> CommonParams:
        """Parameters from the model's generation_config, as `generation_config.default_params` reads it."""
        return self._default_params

    def has_request(self, request_id: str) -> bool:
        """Whether a request of this id has not finished, or its last output has not been taken."""
        return request_id in self._processors or any(output.request_id == request_id for output in self._undelivered)

    def has_unfinished_requests(self) -> bool:
        """Whether step() still has something to compute, to wait for or to deliver."""
        return self._scheduler.has_unfinished or self._scheduler.in_flight > 0 or bool(self._undelivered)

    def step(self) -> list[RequestOutput]:
        """One step for all requests: the outputs that changed, each cumulative.

        With `overlap` they are those of the step before the one that begins here, where nothing waits for that one's. A
        step that raises ends the requests that it, or one begun meanwhile, computed with a StepFailedError in their
        outputs; the engine goes on. Ctrl-C waits until the step is through, so the engine stays usable. Where nothing can
        be computed before a user's function answers, the step waits some milliseconds for that.
        """
        self._enter()
        self._stepping = True
        try:
            with interrupt_deferred():
                self._advance()
        finally:
            self._stepping = False
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def _advance(self) -> None:
        self._deliver(*filter(None, map(self._answered, self._asking.collect())))
        scheduler = self._scheduler
        plan = scheduler.schedule()
        self._deliver(*scheduler.take_ended())
        if plan is None and not scheduler.in_flight:
            if not self._undelivered:
                self._asking.wait(_PATIENCE)
            return
        if plan is not None:
            self._attempt(lambda: self._runner.submit(plan))
        while scheduler.in_flight > (0 if plan is None else scheduler.ahead):
            if (result := self._attempt(self._runner.collect)) is not None:
                self._deliver(*scheduler.apply(result))

    def _attempt(self, call: Callable[[], T]) -> T | None:
        """What a call of the runner returns. Where it raises, all plans that are out are given up, and there is None."""
        try:
            return call()
        except BaseException as error:
            logger.exception("a step failed")
            self._runner.reset()
            self._deliver(*self._scheduler.abandon(error))
            if not isinstance(error, Exception):
                raise  # an exit or interrupt goes on; the engine stays usable
            return None

    def _answered(self, answer: Answer) -> Update | None:
        request_id, found = answer
        if isinstance(found, ValueFunctionError):
            return self._scheduler.fail(request_id, found)
        return self._scheduler.answer(request_id, found)

    def _deliver(self, *updates: Update) -> None:
        """Start what updates ask for, and keep for the caller of step() what they changed."""
        for update in updates:
            processor = self._processors[update.request_id]
            if update.done:
                del self._processors[update.request_id]
                self._runner.processors.forget(processor.request.spec.processors)
                self._asking.cancel(update.request_id)
            else:
                for ask in update.asks:
                    self._asking.start(update.request_id, ask)
            if update.done or update.events or update.scores:
                self._undelivered.append(processor.process(update))

    def _enter(self) -> None:
        """Refuse whoever would change the engine from another thread or in the middle of a step."""
        me = threading.current_thread()
        if self._owner is None:
            self._owner = me
        elif self._owner is not me:
            raise EngineMisuseError("an LLMEngine belongs to the thread that used it first; call it from that thread only")
        if self._stepping:
            raise EngineMisuseError("the engine was called from inside its own step; wait until step() has returned")

    def occupancy(self) -> tuple[int, int, int]:
        """Requests that run, requests that wait, and free blocks: what stats() says of them, for every step to ask."""
        return self._scheduler.num_running, len(self._scheduler.residents.waiting), self._scheduler.kv.pool.free

    def stats(self) -> EngineStats:
        """Numbers of this moment and totals since the start."""
        scheduler, counters, residents = self._scheduler, self._scheduler.counters, self._scheduler.residents
        return EngineStats(
            num_blocks=scheduler.num_blocks - 1,
            free_blocks=scheduler.kv.pool.free,
            cached_blocks=scheduler.kv.pool.cached,
            shared_block_ratio=scheduler.shared_block_ratio,
            num_running=scheduler.num_running,
            num_waiting=len(residents.waiting),
            live_sequences=scheduler.live_sequences,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            forward_tokens=counters.forward_tokens,
            prefix_queries=residents.prefix_queries,
            prefix_hits=residents.prefix_hits,
            preemptions=residents.preemptions,
            forks=scheduler.kv.forks,
            blocks_copied=counters.blocks_copied,
        )

    def check(self) -> None:
        """Raise BlockAccountingError when the block accounting is wrong."""
        self._scheduler.check()

    def info(self) -> dict[str, Any]:
        """What was loaded and how it runs: model, memory (bytes), cache, device, CPU path."""
        return self._built.info(self.config)

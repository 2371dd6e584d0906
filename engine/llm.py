"""LLM: many prompts in, all outputs back, in one continuous batch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import CommonParams

from .config import EngineConfig
from .core import LLMEngine
from .outputs import RequestOutput
from .progress import Bar
from .prompts import Prompt

logger = logging.getLogger("pagefork")

Conversation = list[dict[str, Any]]


class LLM:
    """A model for offline generation. Keyword arguments are the fields of EngineConfig.

    `LLM("demo")` is the built-in model; else a directory or a hub id. `engine` is its LLMEngine.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self.engine = LLMEngine(EngineConfig(model=str(model), **settings))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: CommonParams | Sequence[CommonParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs come in the order of the prompts.

        prompts: a text, a list of token ids, or a list of either. sampling_params: one for all, one for each
        prompt (kinds may mix), or None for the model's generation_config. A request that fails while it runs
        has `error` set and finish_reason "error"; the others are complete. Raises InvalidRequestError
        (a ValueError) before anything runs when a prompt or a parameter can't be honoured.
        """
        listed = _listed(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        return self._complete(listed, texts, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: CommonParams | Sequence[CommonParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer every conversation; outputs come in their order, `prompt` is the text that the chat template made.

        messages: a conversation, a list of {"role": ..., "content": ...}, or a list of conversations. sampling_params and
        errors are those of generate; the other arguments are those of ChatTemplate.render, chat_template_kwargs its
        further variables.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("the checkpoint has no tokenizer, so it can't chat; pass token ids to generate")
        arguments = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
        }
        variables = chat_template_kwargs or {}
        if not isinstance(variables, dict):
            raise InvalidRequestError(f"chat_template_kwargs must be an object of variables, got {type(variables).__name__}")
        if odd := [name for name in variables if not isinstance(name, str)]:
            raise InvalidRequestError(f"chat_template_kwargs names its variables by texts, got {odd[0]!r}")
        if taken := sorted(({"messages"} | arguments.keys()) & variables.keys()):
            raise InvalidRequestError(f"chat_template_kwargs holds {', '.join(taken)}; pass it as an argument of chat")
        texts = [tokenizer.chat_text(conversation, **arguments, **variables) for conversation in _conversations(messages)]
        return self._complete([tokenizer.encode_plain(text) for text in texts], texts, sampling_params, use_tqdm)

    def _complete(
        self,
        prompts: list[Prompt],
        texts: Sequence[str | None],
        sampling_params: CommonParams | Sequence[CommonParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        requests = [
            self.engine.prepare(self._next_id(), prompt, params)
            for prompt, params in zip(prompts, self._params(sampling_params, len(prompts)), strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.engine.queue(request, text)
        ids = [request.id for request in requests]
        try:
            done = self._run(set(ids), use_tqdm)
        except BaseException:
            self.engine.discard(ids)
            raise
        for output in done.values():
            if output.error is not None:
                logger.error("request %s failed: %s", output.request_id, output.error)
        return [done[request_id] for request_id in ids]

    def _next_id(self) -> str:
        """The next number that no request has which was added to the engine directly."""
        return next(name for name in map(str, self._ids) if not self.engine.has_request(name))

    def default_params(self) -> CommonParams:
        """What sampling_params=None means for this model; see LLMEngine.default_params."""
        return self.engine.default_params()

    def _params(self, given: CommonParams | Sequence[CommonParams] | None, count: int) -> list[CommonParams]:
        if given is None:
            return [self.default_params()] * count
        if not isinstance(given, list | tuple):
            return [given] * count  # type: ignore[list-item]  # what is no CommonParams is refused with the request
        params = list(given)
        if len(params) != count:
            raise InvalidRequestError(f"{len(params)} sampling_params for {count} prompts; give one for all, or one for each")
        return params

    def _run(self, waiting: set[str], use_tqdm: bool) -> dict[str, RequestOutput]:
        done: dict[str, RequestOutput] = {}
        others: dict[str, RequestOutput] = {}  # of requests that were added to the engine directly
        try:
            self._step_until(waiting, done, others, use_tqdm)
        finally:
            self.engine.redeliver(others.values())
        return done

    def _step_until(
        self, waiting: set[str], done: dict[str, RequestOutput], others: dict[str, RequestOutput], use_tqdm: bool
    ) -> None:
        counts: dict[str, int] = {}
        with Bar(total=len(waiting), desc="prompts", unit="prompt", disable=not use_tqdm, dynamic_ncols=True) as bar:
            while waiting - done.keys():
                for output in self.engine.step():
                    if output.request_id not in waiting:
                        others[output.request_id] = output
                        continue
                    counts[output.request_id] = sum(len(completion.token_ids) for completion in output.outputs)
                    if output.finished:
                        done[output.request_id] = output
                        bar.update()
                elapsed = bar.format_dict["elapsed"] if use_tqdm else 0
                if elapsed:
                    bar.set_postfix_str(f"{sum(counts.values()) / elapsed:.1f} tokens/s", refresh=False)


def _listed(prompts: Any) -> list[Prompt]:
    """A list of prompts, whichever of the accepted forms was given."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):  # an array
        prompts = prompts.tolist()
    if isinstance(prompts, bytes | bytearray | Mapping | Set) or not isinstance(prompts, Iterable):
        raise InvalidRequestError(f"prompts must be a text, token ids or a list of either, got {type(prompts).__name__}")
    listed = list(prompts)
    if not listed:
        raise InvalidRequestError("prompts is empty; give a text, token ids or a list of either")
    if all(isinstance(item, Integral) and not isinstance(item, bool) for item in listed):
        return [listed]
    return listed


def _conversations(messages: Any) -> list[Conversation]:
    """A list of conversations, whether one or several were given."""
    several = isinstance(messages, list | tuple) and bool(messages) and all(isinstance(item, list | tuple) for item in messages)
    return list(messages) if several else [messages]

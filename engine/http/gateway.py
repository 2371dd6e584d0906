"""What the routes share: the engine's client, the tokenizer, the settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pagefork
from pagefork.chat_template import ChatTemplate
from pagefork.client.async_client import AsyncClient
from pagefork.scheduler.errors import ServiceError
from pagefork.scheduler.params import CommonParams
from pagefork.tokenizer import Tokenizer
from pagefork.wire import Pong, Welcome

from .config import GatewayConfig
from .errors import ApiError
from .running import Call, Prompt

_PULSE_SECONDS = 1.0  # between two questions of how the engine is
_ANSWER_SECONDS = 3.0  # how long an answer may take
_OLD_SECONDS = 6.0  # an answer that is older than this says nothing of now
_TEXTS_AT_ONCE = 4  # texts that are tokenised or rendered
_TAKEN = ("messages", "chat_template", "add_generation_prompt", "continue_final_message", "tools")

FINGERPRINT = f"pagefork-{pagefork.__version__}"


class Gateway:
    """One engine behind one HTTP server."""

    def __init__(
        self, config: GatewayConfig, client: AsyncClient, welcome: Welcome, tokenizer: Tokenizer | None, chat: ChatTemplate | None
    ) -> None:
        self.config = config
        self.client = client
        self.welcome = welcome
        self.stopping = asyncio.Event()  # set when the answers that are open are to end
        self.draining = False
        self.started = int(time.time())
        self.pong: Pong | None = None
        self.heard = asyncio.Event()  # set once there is a pong
        self._heard_at = 0.0
        self._tokenizer = tokenizer
        self._chat = chat
        self._texts = asyncio.Semaphore(_TEXTS_AT_ONCE)

    async def pulse(self) -> None:
        """Ask the engine how it is, again and again."""
        while True:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    self.pong = await self.client.health()
                self._heard_at = time.monotonic()
                self.heard.set()
            except (ServiceError, TimeoutError):
                pass
            await asyncio.sleep(_PULSE_SECONDS)

    @property
    def is_lost(self) -> bool:
        """Whether the engine has not answered lately."""
        return time.monotonic() - self._heard_at > _OLD_SECONDS

    def check_reachable(self) -> None:
        """Raise ApiError (503) at once where a call would wait for an engine in vain."""
        if self.is_lost:
            raise ApiError(503, "the engine does not answer", code="engine_lost", headers={"retry-after": "1"})

    def trouble(self) -> str | None:
        """Why requests would not be served now; None when they would."""
        if self.pong is None or self.is_lost:
            return "the engine does not answer"
        if self.draining or self.pong.state != "running":
            return "draining"
        if self.pong.last_step_age_ms > self.config.stalled_seconds * 1000:
            return f"the engine's step takes {self.pong.last_step_age_ms / 1000:.0f} s"
        return None

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for a model that is not served here."""
        if name is not None and name not in self.config.model_names:
            raise ApiError(
                404,
                f"there is no model {name!r:.80}; there is {', '.join(self.config.model_names)}",
                param="model",
                code="model_not_found",
            )

    def streaming(self, request: Any) -> bool:
        """Whether a body asks for a stream. Raises ApiError for what a stream can't have."""
        options = request.stream_options
        if options is not None:
            if not request.stream:
                raise ApiError(400, "stream_options takes stream: true", param="stream_options")
            if options.include_obfuscation:
                raise ApiError(400, "include_obfuscation is not supported; it may be false", param="stream_options")
        if request.stream and request.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs can't be streamed: they come at the end", param="prompt_logprobs")
        return bool(request.stream)

    def call(self, request: Any, prompts: list[Prompt], params: CommonParams, *, prefix: str, stream: bool) -> Call:
        """What a body asks for."""
        options = request.stream_options
        return Call(
            model=request.model,
            prompts=prompts,
            params=params,
            stream=stream,
            include_usage=options is not None and bool(options.include_usage),
            priority=request.priority or 0,
            deadline=self.config.deadline_seconds,
            prefix=prefix,
        )

    def frame(self, call: Call) -> dict[str, Any]:
        """The fields that every answer to a call has."""
        return {"id": call.id, "created": call.created, "model": call.model, "system_fingerprint": FINGERPRINT}

    async def prompts(self, given: str | list[Any], add_special_tokens: bool) -> list[Prompt]:
        """The prompts that a body's `prompt` stands for: a text, token ids, or a list of either. Raises ApiError."""
        listed: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        if not 1 <= len(listed) <= self.config.max_prompts:
            raise ApiError(400, f"prompt has {len(listed)} prompts; 1 to {self.config.max_prompts} are allowed", param="prompt")
        for prompt in listed:
            if isinstance(prompt, str):
                self.check_text(prompt, "prompt")
            elif not prompt or isinstance(prompt, int):
                raise ApiError(
                    400, f"prompt has {prompt} among prompts; a prompt is a text or a list of token ids", param="prompt"
                )
            else:
                self.check_tokens(prompt, "prompt")
        if add_special_tokens:
            return listed
        return [await self.tokens(prompt, False) if isinstance(prompt, str) else prompt for prompt in listed]

    async def conversation(self, request: Any) -> list[int]:
        """The token ids of a body's `messages`. Raises ApiError or InvalidRequestError."""
        tokenizer, chat = self.tokenizer(), self._chat
        if chat is None:
            raise ApiError(
                400,
                "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
                param="messages",
                code="no_chat_template",
            )
        variables = request.chat_template_kwargs or {}
        if taken := [name for name in _TAKEN if name in variables]:
            raise ApiError(400, f"chat_template_kwargs has {taken[0]!r}, which is no variable", param="chat_template_kwargs")
        if not all(name.isidentifier() for name in variables):
            raise ApiError(400, "chat_template_kwargs names its variables by identifiers", param="chat_template_kwargs")
        goes_on = bool(request.continue_final_message)
        begins = not goes_on if request.add_generation_prompt is None else request.add_generation_prompt

        def render() -> list[int]:
            text = chat.render(request.messages, add_generation_prompt=begins, continue_final_message=goes_on, **variables)
            self.check_text(text, "messages")
            return tokenizer.encode_plain(text)  # the template has written the special tokens

        async with self._texts:
            return await asyncio.to_thread(render)

    async def tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        """The token ids of a text."""
        tokenizer = self.tokenizer()
        encode = tokenizer.encode if add_special_tokens else tokenizer.encode_plain
        async with self._texts:
            return await asyncio.to_thread(encode, text)

    def text_of(self, prompt: Prompt, skip_special_tokens: bool = False) -> str:
        """The text of a prompt."""
        return prompt if isinstance(prompt, str) else self.tokenizer().decode(prompt, skip_special_tokens)

    def check_text(self, text: str, param: str) -> None:
        """Raise ApiError for a text that is too long."""
        limit = self.welcome.limits.get("max_text_bytes")
        if limit is not None and len(text) > limit // 4 and (size := len(text.encode())) > limit:
            raise ApiError(400, f"{param} has a text of {size} bytes; {limit} are allowed", param=param, code="too_large")

    def check_tokens(self, tokens: Sequence[Any], param: str) -> None:
        """Raise ApiError for what is no list of the model's token ids."""
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.welcome.vocab_size:
                raise ApiError(
                    400, f"{param} has {token!r:.40}; token ids go from 0 to {self.welcome.vocab_size - 1}", param=param
                )

    def tokenizer(self) -> Tokenizer:
        """Raises ApiError for a checkpoint without one."""
        if self._tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: pass token ids to /v1/completions", code="no_tokenizer")
        return self._tokenizer

"""/v1/completions: from a body to a call, and from outputs to answers."""

from __future__ import annotations

from typing import Any

from pagefork.outputs import CompletionOutput, RequestOutput

from .errors import ApiError
from .fields import COMPLETION, params_of
from .gateway import Gateway
from .logprobs import Entries, entries, for_completion
from .running import Call, Piece, usage_of
from .schemas import Completion, CompletionChoice, CompletionLogprobs, Usage


class Completions:
    """The answers to one call of /v1/completions.

    echo: the texts that the choices begin with, one for each prompt. scoring: what is generated is left out.
    """

    def __init__(self, gateway: Gateway, call: Call, echo: list[str] | None, scoring: bool) -> None:
        self.call = call
        self._gateway = gateway
        self._echo = echo
        self._scoring = scoring
        self._offsets: dict[int, int] = {}

    @classmethod
    async def read(cls, gateway: Gateway, body: dict[str, Any]) -> Completions:
        """From a body. Raises ApiError or InvalidRequestError for what can't be honoured."""
        request = COMPLETION.read(body)
        gateway.check_model(request.model)
        stream = gateway.streaming(request)
        prompts = await gateway.prompts(request.prompt, request.add_special_tokens is not False)
        changes: dict[str, Any] = {"logprobs": request.logprobs}
        scoring = request.max_tokens == 0
        if scoring:
            if not request.echo:
                raise ApiError(400, "max_tokens=0 generates nothing; it scores a prompt, with echo", param="max_tokens")
            changes["max_tokens"] = 1
        if request.echo and request.logprobs is not None:
            if stream:
                raise ApiError(400, "echo with logprobs can't be streamed: those of a prompt come at the end", param="echo")
            changes["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
        params = params_of(request, {}, changes)
        call = gateway.call(request, prompts, params, prefix="cmpl", stream=stream)
        return cls(gateway, call, [gateway.text_of(prompt) for prompt in prompts] if request.echo else None, scoring)

    def answer(self, outputs: list[RequestOutput]) -> Completion:
        """The whole answer."""
        choices = [
            self._whole(at * self.call.choices + completion.index, at, output, completion)
            for at, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return self._event(choices, usage_of(outputs, scoring=self._scoring))

    def opening(self) -> list[Completion]:
        """What a stream begins with."""
        if self._echo is None:
            return []
        texts = [text for text in self._echo for _ in range(self.call.choices)]
        return [self._event([CompletionChoice(index=choice, text=text)]) for choice, text in enumerate(texts)]

    def piece(self, piece: Piece) -> Completion | None:
        """What a choice has grown by."""
        if self._scoring:
            return None
        logprobs = None
        if piece.logprobs is not None:
            begin = self._offsets.get(piece.choice, 0)
            logprobs = self._logprobs(entries(piece.tokens, piece.logprobs), begin)
            self._offsets[piece.choice] = begin + sum(map(len, logprobs.tokens))
        return self._event([CompletionChoice(index=piece.choice, text=piece.text, logprobs=logprobs)])

    def ending(self, choice: int, completion: CompletionOutput) -> Completion:
        """How a choice ended."""
        return self._event([CompletionChoice(index=choice, text="", **ending_of(completion))])

    def usage(self, outputs: list[RequestOutput]) -> Completion:
        """The last event, where the usage was asked for."""
        return self._event([], usage_of(outputs, scoring=self._scoring))

    def _whole(self, choice: int, at: int, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        prompt = "" if self._echo is None else self._echo[at]
        found: list[tuple[int, Any]] = []
        if completion.logprobs is not None:
            if self._echo is not None:
                found += entries(output.prompt_token_ids, output.prompt_logprobs or [])
            if not self._scoring:
                found += entries(completion.token_ids, completion.logprobs)
        text = prompt if self._scoring else prompt + completion.text
        asked = completion.logprobs is not None
        return CompletionChoice(
            index=choice,
            text=text,
            logprobs=self._logprobs(found) if asked else None,
            prompt_logprobs=output.prompt_logprobs,
            **ending_of(completion),
        )

    def _logprobs(self, found: Entries, offset: int = 0) -> CompletionLogprobs:
        return for_completion(found, offset, lambda token: self._gateway.text_of([token]))

    def _event(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(choices=choices, usage=usage, **self._gateway.frame(self.call))


def ending_of(completion: CompletionOutput) -> dict[str, Any]:
    """The fields of a choice that say how it ended."""
    return {
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "score": completion.score,
    }

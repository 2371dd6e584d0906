"""/v1/chat/completions: from a body to a call, and from outputs to answers."""

from __future__ import annotations

from typing import Any

from pagefork.outputs import CompletionOutput, Logprob, RequestOutput

from .completions import ending_of
from .errors import ApiError
from .fields import CHAT, params_of
from .gateway import Gateway
from .logprobs import entries, for_chat
from .running import Call, Piece, usage_of
from .schemas import ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, Message, MessageDelta


class Chat:
    """The answers to one call of /v1/chat/completions. top: most probable tokens to tell of at each."""

    def __init__(self, gateway: Gateway, call: Call, top: int) -> None:
        self.call = call
        self._gateway = gateway
        self._top = top

    @classmethod
    async def read(cls, gateway: Gateway, body: dict[str, Any]) -> Chat:
        """From a body. Raises ApiError or InvalidRequestError for what can't be honoured."""
        request = CHAT.read(body)
        gateway.check_model(request.model)
        stream = gateway.streaming(request)
        changes: dict[str, Any] = {}
        if request.logprobs:
            changes["logprobs"] = request.top_logprobs or 0
        elif request.top_logprobs is not None:
            raise ApiError(400, "top_logprobs takes logprobs: true", param="top_logprobs")
        if request.max_completion_tokens is not None:
            if request.max_tokens not in (None, request.max_completion_tokens):
                raise ApiError(
                    400, "max_tokens and max_completion_tokens are one thing, and differ", param="max_completion_tokens"
                )
            changes["max_tokens"] = request.max_completion_tokens
        params = params_of(request, {"max_tokens": None}, changes)
        prompt = await gateway.conversation(request)
        call = gateway.call(request, [prompt], params, prefix="chatcmpl", stream=stream)
        return cls(gateway, call, request.top_logprobs or 0)

    def answer(self, outputs: list[RequestOutput]) -> ChatCompletion:
        """The whole answer."""
        [output] = outputs
        choices = [
            ChatChoice(
                index=completion.index,
                message=Message(content=completion.text),
                logprobs=self._logprobs(completion.token_ids, completion.logprobs),
                prompt_logprobs=output.prompt_logprobs,
                **ending_of(completion),
            )
            for completion in output.outputs
        ]
        return ChatCompletion(choices=choices, usage=usage_of(outputs), **self._gateway.frame(self.call))

    def opening(self) -> list[ChatChunk]:
        """What a stream begins with."""
        delta = MessageDelta(role="assistant", content="")
        return [self._event(ChatChunkChoice(index=choice, delta=delta)) for choice in range(self.call.choices)]

    def piece(self, piece: Piece) -> ChatChunk:
        """What a choice has grown by."""
        logprobs = self._logprobs(piece.tokens, piece.logprobs)
        return self._event(ChatChunkChoice(index=piece.choice, delta=MessageDelta(content=piece.text), logprobs=logprobs))

    def ending(self, choice: int, completion: CompletionOutput) -> ChatChunk:
        """How a choice ended."""
        return self._event(ChatChunkChoice(index=choice, delta=MessageDelta(), **ending_of(completion)))

    def usage(self, outputs: list[RequestOutput]) -> ChatChunk:
        """The last event, where the usage was asked for."""
        return ChatChunk(choices=[], usage=usage_of(outputs), **self._gateway.frame(self.call))

    def _logprobs(self, tokens: list[int], logprobs: list[dict[int, Logprob]] | None) -> ChatLogprobs | None:
        return None if logprobs is None else for_chat(entries(tokens, logprobs), self._top)

    def _event(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(choices=[choice], **self._gateway.frame(self.call))

"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Any

from .errors import ApiError
from .fields import convert
from .gateway import Gateway
from .schemas import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest


async def tokenize(gateway: Gateway, body: dict[str, Any]) -> Tokenized:
    """The token ids of a text or a conversation. Raises ApiError or InvalidRequestError."""
    request: TokenizeRequest = convert(body, TokenizeRequest)
    gateway.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if request.prompt is not None:
        for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(request, name) is not None:
                raise ApiError(400, f"{name} belongs to messages, and there is a prompt", param=name)
        gateway.check_text(request.prompt, "prompt")
        tokens = await gateway.tokens(request.prompt, request.add_special_tokens is not False)
    else:
        if request.add_special_tokens:
            raise ApiError(400, "add_special_tokens: the chat template writes them; it may be false", param="add_special_tokens")
        tokens = await gateway.conversation(request)
    texts = [gateway.text_of([token]) for token in tokens] if request.return_token_strs else None
    return Tokenized(count=len(tokens), max_model_len=gateway.welcome.max_model_len, tokens=tokens, token_strs=texts)


async def detokenize(gateway: Gateway, body: dict[str, Any]) -> Detokenized:
    """The text of token ids, special ones too. Raises ApiError."""
    request: DetokenizeRequest = convert(body, DetokenizeRequest)
    gateway.check_model(request.model)
    gateway.check_tokens(request.tokens, "tokens")
    return Detokenized(prompt=await asyncio.to_thread(gateway.text_of, request.tokens))

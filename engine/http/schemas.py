"""What the gateway answers with, in OpenAI's shapes; what is not OpenAI's says so."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pagefork.outputs import Logprob


class _Answer(msgspec.Struct, kw_only=True):
    """Fields without a value are there, as null."""


class PromptDetails(_Answer, kw_only=True):
    """cached_tokens: of the prompts, found in the prefix cache."""

    cached_tokens: int


class Usage(_Answer, kw_only=True):
    """Tokens, of all prompts and outputs of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(_Answer, kw_only=True):
    """One entry for each token. text_offset: of the token's text, counted from the beginning of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


FinishReason = Literal["stop", "length", "abort", "error"]
PromptLogprobs = list[dict[int, Logprob] | None]


class CompletionChoice(_Answer, kw_only=True):
    """stop_reason, score and prompt_logprobs are not OpenAI's: which stop text or token ended it, a search's score."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    score: float | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(_Answer, kw_only=True):
    """The answer of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | None = None


class TopLogprob(_Answer, kw_only=True):
    """`bytes` is null for a token that ends within a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob, kw_only=True):
    """The token that was chosen, and the most probable ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer, kw_only=True):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None = None


class Message(_Answer, kw_only=True):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class MessageDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a turn has grown by."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(_Answer, kw_only=True):
    """stop_reason, score and prompt_logprobs: see CompletionChoice."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    score: float | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChatCompletion(_Answer, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: Usage | None = None


class ChatChunkChoice(_Answer, kw_only=True):
    """A choice in an event."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    score: float | None = None


class ChatChunk(_Answer, kw_only=True):
    """An event of the stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None


class Model(_Answer, kw_only=True):
    """max_model_len is not OpenAI's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pagefork"
    max_model_len: int


class ModelList(_Answer, kw_only=True):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text (`prompt`), or a conversation (`messages`) as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Tokenized(_Answer, kw_only=True):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


class Detokenized(_Answer, kw_only=True):
    """The answer of /detokenize."""

    prompt: str


class Health(_Answer, kw_only=True):
    """`status` is "running", or what keeps the engine from it."""

    status: str
    running: int | None = None
    waiting: int | None = None
    free_blocks: int | None = None
    last_step_age_ms: int | None = None


class Version(_Answer, kw_only=True):
    """Of Pagefork."""

    version: str


class Problem(_Answer, kw_only=True):
    """What was wrong; param: the field that it is about."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(_Answer, kw_only=True):
    """Every answer that is an error."""

    error: Problem

"""Prompts, as users pass them, to token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from pagefork.scheduler.errors import InvalidRequestError

from .tokenizer import Tokenizer


class TokenizedText(list[int]):
    """The token ids that PromptReader.read has found for a text, which need no second look."""

    def __init__(self, ids: Iterable[int], text: str) -> None:
        super().__init__(ids)
        self.text = text


Prompt = str | Sequence[int] | TokenizedText


class PromptReader:
    """Tokenises and checks the prompts for one model. Immutable and safe to share: any thread may read with it."""

    def __init__(self, tokenizer: Tokenizer | None, first_token: int | None, vocab_size: int) -> None:
        """first_token: what an empty text starts from."""
        self._tokenizer = tokenizer
        self._first_token = first_token
        self._vocab_size = vocab_size

    def read(self, prompt: Prompt) -> list[int]:
        """The token ids of a text, or those that are given. Raises InvalidRequestError."""
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        if isinstance(prompt, TokenizedText):
            return prompt
        if hasattr(prompt, "tolist"):  # an array
            prompt = prompt.tolist()
        if isinstance(prompt, bytes | bytearray | Mapping | Set) or not isinstance(prompt, Iterable):
            raise InvalidRequestError(f"a prompt is a text or a list of token ids, got {type(prompt).__name__}")
        ids = [_token_id(token) for token in prompt]
        if not ids:
            raise InvalidRequestError('the prompt is an empty list of token ids; pass "" to start from the model\'s first token')
        self.check_range("the prompt", ids)
        return ids

    def tokenize(self, text: str) -> TokenizedText:
        """The token ids of a text, at least one. Raises InvalidRequestError."""
        if self._tokenizer is None:
            raise InvalidRequestError("the checkpoint has no tokenizer: pass the prompt as a list of token ids")
        ids = self._tokenizer.encode(text) or ([] if self._first_token is None else [self._first_token])
        if not ids:
            raise InvalidRequestError("the prompt is empty, and the model has no token to start from")
        self.check_range("the prompt", ids)  # a tokenizer may know tokens that the model has no embedding for
        return TokenizedText(ids, text)

    def text(self, prompt: Prompt, ids: Sequence[int]) -> str:
        """The text of a prompt that was read as `ids`; "" where there is no tokenizer to tell."""
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, TokenizedText):
            return prompt.text
        return self._tokenizer.decode(ids, True) if self._tokenizer is not None else ""

    def check_range(self, what: str, ids: Sequence[int]) -> None:
        """Raises InvalidRequestError for an id that the model doesn't have."""
        if ids and (min(ids) < 0 or max(ids) >= self._vocab_size):
            token = next(token for token in ids if not 0 <= token < self._vocab_size)
            raise InvalidRequestError(f"{what} has token id {token}; the model's ids go from 0 to {self._vocab_size - 1}")


def _token_id(token: Any) -> int:
    try:
        if isinstance(token, bool):
            raise TypeError
        return operator.index(token)
    except TypeError:
        raise InvalidRequestError(f"the prompt holds {token!r}; a list prompt holds token ids (integers)") from None

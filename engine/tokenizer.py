"""Text to token ids and back, through the tokenizers library."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as _Tokenizer

from pagefork.scheduler.errors import InvalidRequestError, ModelError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 8  # tokens; UTF-8 needs at most 4 bytes, so a longer undecodable run is no character


class DetokState(NamedTuple):
    """Where incremental decoding stands: the tokens since the last safe boundary, and how many of them were shown."""

    window: tuple[int, ...] = ()
    shown: int = 0


class Tokenizer:
    """The tokenizer of a checkpoint directory. Immutable and safe to share."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """From tokenizer.json, else whatever transformers can convert; None when the checkpoint has none."""
        fast = directory / "tokenizer.json"
        try:
            if fast.is_file():
                return cls(_Tokenizer.from_file(str(fast)))
            if any(
                (directory / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
            ):
                from transformers import AutoTokenizer

                return cls(AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer)
        except Exception as error:
            raise ModelError(f"the tokenizer in {directory} can't be loaded: {error}") from error
        return None

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint's template adds."""
        try:
            ids: list[int] = self._backend.encode(text).ids
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequestError("the prompt is not valid Unicode text: it holds a lone surrogate") from None
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text, with nothing added."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int] | tuple[int, ...], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def step(self, state: DetokState, token: int, skip_special_tokens: bool = True) -> tuple[DetokState, str]:
        """The next state and the text that `token` adds; "" while it ends inside a character.

        A token's text depends on the tokens before it (spaces, bytes of one character), so each piece is the
        difference of decoding a short window with and without the new tokens.
        """
        window = (*state.window, token)
        before = self.decode(window[: state.shown], skip_special_tokens)
        after = self.decode(window, skip_special_tokens)
        if after.endswith(_REPLACEMENT) and len(window) - state.shown < _LONGEST_CHARACTER:
            return DetokState(window, state.shown), ""
        fresh = window[state.shown :]
        return DetokState(fresh, len(fresh)), after[len(before) :]

    def rest(self, state: DetokState, skip_special_tokens: bool = True) -> str:
        """What was held back, at the end of an output."""
        if len(state.window) == state.shown:
            return ""
        before = self.decode(state.window[: state.shown], skip_special_tokens)
        return self.decode(state.window, skip_special_tokens)[len(before) :]

"""Text to token ids and back, through the tokenizers library."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as _Tokenizer

from pagefork.scheduler.errors import InvalidRequestError, ModelError

from .added_tokens import added_tokens
from .chat_template import ChatTemplate
from .cleanup import clean, clean_settled
from .json_file import JsonObject, read_json

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPELLED = (_REPLACEMENT, "ï¿½", "<0xEF><0xBF><0xBD>")  # the character itself, in the alphabets of bytes that tokenizers use
_LONGEST_CHARACTER = 8  # tokens; UTF-8 needs at most 4 bytes, so a longer undecodable run is no character
_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", *_PIECES)
_HINT = (
    " Without a tokenizer.json, {} takes the packages sentencepiece and protobuf (tiktoken, if it is one of its files): "
    "install them, or let transformers save a tokenizer.json where they are."
)


class DetokState(NamedTuple):
    """Where incremental decoding stands.

    window: the last tokens that were shown, as context, and after those `shown` tokens the ones that wait for more.
    part: how many characters of the waiting tokens were shown. tail: text that a clean-up of spaces may yet change.
    """

    window: tuple[int, ...] = ()
    shown: int = 0
    part: int = 0
    tail: str = ""


class Tokenizer:
    """The tokenizer of a checkpoint directory. Immutable and safe to share."""

    def __init__(self, backend: Any, chat: ChatTemplate | None = None, cleans_up: bool = False) -> None:
        self._backend = backend
        self._chat = chat or ChatTemplate({}, {})
        self._cleans_up = cleans_up
        self._special = frozenset(number for number, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """From tokenizer.json, else whatever transformers can convert; None when the checkpoint has none.

        Raises ModelError when there is one that can't be loaded.
        """
        file = directory / "tokenizer_config.json"
        if not any((directory / name).is_file() for name in _VOCABULARIES):
            if file.is_file():
                raise ModelError(f"{directory} has a tokenizer_config.json, but none of {', '.join(_VOCABULARIES)}")
            return None
        config = read_json(file) if file.is_file() else {}
        backend, chat = _backend(directory, config), ChatTemplate.load(directory)
        backend.no_truncation()  # what a training run left in tokenizer.json would cut and pad prompts
        backend.no_padding()
        # As in transformers: byte-pair encodings keep their spaces, whatever their configuration says.
        cleans_up = bool(config.get("clean_up_tokenization_spaces")) and type(backend.model).__name__ != "BPE"
        return cls(backend, chat, cleans_up)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat templates; None when it has none."""
        return self._chat if self._chat.templates else None

    @property
    def eos_token_id(self) -> int | None:
        """The id of tokenizer_config.json's eos_token."""
        token = self._chat.special_tokens.get("eos_token")
        found: int | None = None if token is None else self._backend.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint's template adds."""
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequestError(f"{text[:40]!r} is not valid Unicode text: it holds a lone surrogate") from None
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text, with nothing added. Raises InvalidRequestError as encode does."""
        return self._encode(text, add_special_tokens=False)

    def render_chat(self, messages: list[dict[str, Any]], /, **arguments: Any) -> list[int]:
        """Token ids of a conversation; templates write their special tokens themselves, so none are added.

        Arguments and errors are those of ChatTemplate.render.
        """
        return self.encode_plain(self.chat_text(messages, **arguments))

    def chat_text(self, messages: list[dict[str, Any]], /, **arguments: Any) -> str:
        """The text of a conversation. Arguments and errors are those of ChatTemplate.render."""
        return self._chat.render(messages, **arguments)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        text = self._decode(ids, skip_special_tokens)
        return clean(text) if self._cleans_up else text

    def step(self, state: DetokState, token: int, skip_special_tokens: bool = True) -> tuple[DetokState, str]:
        """The next state and the text that `token` adds; "" while it ends inside a character.

        A token's text depends on the tokens before it (spaces, bytes of one character), so each piece is the
        difference of decoding a short window with and without the new tokens. Pieces add up to decode() of all tokens,
        except where that holds U+FFFD: bytes that are no text may then come out as more or fewer of them.
        """
        window = (*state.window, token)
        whole, text = self._texts(window, state.shown, skip_special_tokens)
        if self._ends_within_character(whole, window) and len(window) - state.shown < _LONGEST_CHARACTER:
            return self._within_character(state, window, text, skip_special_tokens)
        if not text and self._is_hidden(token, skip_special_tokens):
            return state, ""  # no context for what follows: a decoder drops the space of the first token that it sees
        fresh = window[state.shown :]
        text, tail = self._cleaned(state.tail, text[state.part :])
        return DetokState(fresh, len(fresh), 0, tail), text

    def _within_character(
        self, state: DetokState, window: tuple[int, ...], text: str, skip_special_tokens: bool
    ) -> tuple[DetokState, str]:
        """As step, when the last token ends within a character; it may have completed another."""
        settled = max(state.part, len(text.rstrip(_REPLACEMENT)))
        if settled == state.part or len(text) - settled > 1:
            return state._replace(window=window), ""
        # Tokens of some scripts end so one after the other. The last one alone has all bytes that wait.
        last = self._decode(window[-1:], skip_special_tokens)
        text, tail = self._cleaned(state.tail, text[state.part : settled])
        return DetokState(window[-1:], 0, len(last) - 1, tail), text

    def rest(self, state: DetokState, skip_special_tokens: bool = True) -> str:
        """What was held back, at the end of an output."""
        text = ""
        if len(state.window) > state.shown:
            text = self._texts(state.window, state.shown, skip_special_tokens)[1][state.part :]
        return clean(state.tail + text) if self._cleans_up else text

    def _texts(self, window: tuple[int, ...], shown: int, skip_special_tokens: bool) -> tuple[str, str]:
        """The text of the window, and what the tokens after the first `shown` add to it."""
        before = self._decode(window[:shown], skip_special_tokens)
        whole = self._decode(window, skip_special_tokens)
        if whole.startswith(before):
            return whole, whole[len(before) :]
        # Byte-fallback decoders give up a whole run of bytes for one that fits nowhere; what was shown stays.
        return whole, self._decode(window[shown:], skip_special_tokens)

    def _cleaned(self, tail: str, text: str) -> tuple[str, str]:
        return clean_settled(tail + text) if self._cleans_up else (text, "")

    def _ends_within_character(self, text: str, window: tuple[int, ...]) -> bool:
        if not text.endswith(_REPLACEMENT):
            return False
        return not "".join(self._backend.id_to_token(token) or "" for token in window[-3:]).endswith(_SPELLED)

    def _is_hidden(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether decoders never see the token."""
        return (skip_special_tokens and token in self._special) or self._backend.id_to_token(token) is None

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


def _backend(directory: Path, config: JsonObject) -> Any:
    try:
        if (directory / "tokenizer.json").is_file():
            backend = _Tokenizer.from_file(str(directory / "tokenizer.json"))
            backend.add_tokens(added_tokens(directory, config, backend))
            return backend
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
    except Exception as error:
        pieces = [name for name in _PIECES if (directory / name).is_file()]
        hint = _HINT.format(pieces[0]) if pieces and find_spec("sentencepiece") is None else ""
        raise ModelError(f"the tokenizer in {directory} can't be loaded: {error}{hint}") from error

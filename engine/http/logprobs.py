"""Log-probs in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pagefork.outputs import Logprob

from .schemas import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_LOWEST = -9999.0  # JSON has no infinity
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Entries = Iterable[tuple[int, dict[int, Logprob] | None]]  # token, and the log-probs at it; None: nothing precedes it


def entries(tokens: Sequence[int], logprobs: Sequence[dict[int, Logprob] | None]) -> Entries:
    """Tokens with their log-probs."""
    return zip(tokens, logprobs, strict=True)


def for_completion(found: Entries, offset: int, text_of: Callable[[int], str]) -> CompletionLogprobs:
    """The shape of /v1/completions, of tokens whose text begins at `offset`. text_of: the text of one without log-probs."""
    shape = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token, table in found:
        chosen = None if table is None else table[token]
        text = text_of(token) if chosen is None else chosen.decoded_token or ""
        shape.text_offset.append(offset)
        shape.tokens.append(text)
        shape.token_logprobs.append(None if chosen is None else _finite(chosen))
        shape.top_logprobs.append(None if table is None else _by_text(table))
        offset += len(text)
    return shape


def for_chat(found: Entries, top: int) -> ChatLogprobs:
    """The shape of /v1/chat/completions, with the `top` most probable tokens at each."""
    content = []
    for token, table in found:
        if table is not None:
            ranked = sorted(
                (entry for entry in table.values() if (entry.rank or top + 1) <= top), key=lambda entry: entry.rank or 0
            )
            best = [TopLogprob(**_told(entry)) for entry in ranked[:top]]
            content.append(TokenLogprob(**_told(table[token]), top_logprobs=best))
    return ChatLogprobs(content=content)


def _told(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token or ""
    return {"token": text, "logprob": _finite(entry), "bytes": None if _REPLACEMENT in text else [*text.encode()]}


def _by_text(table: dict[int, Logprob]) -> dict[str, float]:
    """Several tokens may have one text, e.g. parts of characters: the most probable one stands."""
    found: dict[str, float] = {}
    for entry in table.values():
        text = entry.decoded_token or ""
        found[text] = max(found.get(text, _LOWEST), _finite(entry))
    return found


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST)

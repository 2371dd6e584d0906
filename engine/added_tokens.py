"""Tokens that a tokenizer's other files add to those of tokenizer.json, or flag otherwise, as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from .json_file import JsonObject, read_json

_FIRST = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def added_tokens(directory: Path, config: JsonObject, backend: Any) -> list[AddedToken]:
    """What to add to the backend that tokenizer.json made, in this order: new ones get the next ids, known ones other flags.

    config: the contents of tokenizer_config.json. First come the tokens of its added_tokens_decoder by their ids, then
    those named bos_token and the like, then additional_special_tokens. Where older checkpoints have no added_tokens_decoder,
    added_tokens.json and special_tokens_map.json stand in for it. Raises KeyError, TypeError or ValueError for other contents.
    """
    own: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    if "added_tokens_decoder" not in config:
        config = config | _read(directory / "special_tokens_map.json")
    named, further = _special(config)
    if "added_tokens_decoder" in config:
        by_id = {int(number): _token(entry, False) for number, entry in config["added_tokens_decoder"].items()}
    else:
        special = {token.content for token in named}
        older = _read(directory / "added_tokens.json")
        by_id = {number: AddedToken(text, special=text in special) for text, number in older.items()} | own
    tokens = [token for _, token in sorted(by_id.items())]
    known = {token.content for token in (*own.values(), *tokens)}
    for token in (*named, *further):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    names = {token.content for token in named}
    for token in tokens:
        token.special = token.special or token.content in names
    return tokens


def _special(config: JsonObject) -> tuple[list[AddedToken], list[AddedToken]]:
    """The tokens that have a name of their own, and the further ones."""
    further = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = [*_FIRST, *(name for name in config if name.endswith("_token") and name not in _FIRST)]
    entries = {name: config[name] for name in names if isinstance(config.get(name), str | dict)}
    if isinstance(further, dict):
        entries, further = entries | further, []
    return [_token(entry, True) for entry in entries.values()], [_token(entry, True) for entry in further]


def _token(entry: Any, special: bool) -> AddedToken:
    """entry: the text of the token, or an object with its content and flags."""
    if isinstance(entry, str):
        return AddedToken(entry, special=special)
    flags = {name: value for name, value in entry.items() if name not in ("__type", "content")}
    return AddedToken(entry["content"], **{"special": special, **flags})


def _read(path: Path) -> JsonObject:
    return read_json(path) if path.is_file() else {}

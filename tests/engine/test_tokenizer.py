"""Tokenizers of every kind: streamed pieces add up to the text that transformers decodes, and show no half character."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tokenizers import EVERY_TEXT, KINDS, SPECIAL, backend, corpus, save
from transformers import AutoTokenizer

from pagefork import InvalidRequestError, ModelError
from pagefork.cleanup import clean, clean_settled
from pagefork.demo import demo_path
from pagefork.tokenizer import DetokState, Tokenizer

TEXTS = st.lists(
    st.sampled_from([*SPECIAL, "<tool>", "the", "ing", "'s", " .", "  ", "\n", "né", "日本", "😀", "สวัสดี", "न", "\ufffd"])
    | st.text(max_size=8),
    max_size=12,
).map("".join)
KIND = st.sampled_from(sorted(KINDS))


def token_id(kind: str, name: str) -> int:
    found = backend(kind).token_to_id(name)
    assert found is not None
    return found


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    state, shown = DetokState(), []
    for token in ids:
        state, text = tokenizer.step(state, token, skip)
        shown.append(text)
    return [*shown, tokenizer.rest(state, skip)]


@given(kind=KIND, text=TEXTS, skip=st.booleans())
@settings(max_examples=700, deadline=None)
def test_pieces_of_any_text_are_the_text_without_half_characters(kind: str, text: str, skip: bool) -> None:
    tokenizer = Tokenizer(backend(kind))
    ids = tokenizer.encode(text)
    shown, whole = stream(tokenizer, ids, skip), tokenizer.decode(ids, skip)
    assert "".join(shown) == whole
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("kind", EVERY_TEXT)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
@settings(max_examples=100, deadline=None)
def test_tokenizers_with_bytes_stream_every_text_as_it_was(kind: str, text: str) -> None:
    tokenizer = Tokenizer(backend(kind))
    assert "".join(stream(tokenizer, tokenizer.encode(text), skip=False)) == text


@given(kind=KIND, seed=st.integers(0, 10**6), count=st.integers(0, 40), skip=st.booleans())
@settings(max_examples=700, deadline=None)
def test_pieces_of_any_tokens_are_what_decoding_all_at_once_gives(kind: str, seed: int, count: int, skip: bool) -> None:
    """Random tokens are rarely valid UTF-8. Byte-level decoders put the same U+FFFD there whether they see all or a part;
    byte fallback gives up every byte of a run for one bad one, also those that were text when they were shown."""
    tokenizer = Tokenizer(backend(kind))
    rng = random.Random(seed)
    ids = [rng.randrange(backend(kind).get_vocab_size() + 2) for _ in range(count)]  # two that it doesn't know
    whole = tokenizer.decode(ids, skip)
    if "\ufffd" not in whole or kind == "byte_level":
        assert "".join(stream(tokenizer, ids, skip)) == whole


@pytest.mark.parametrize("kind", EVERY_TEXT)
def test_a_run_of_bytes_that_are_no_character_is_neither_held_back_nor_remembered(kind: str) -> None:
    tokenizer = Tokenizer(backend(kind))
    byte = next(token for token in range(4, 400) if tokenizer.decode([token]) == "\ufffd")
    state, shown = DetokState(), [""]
    for _ in range(60):
        state, text = tokenizer.step(state, byte)
        shown.append(shown[-1] + text)
        assert len(state.window) < 20
    assert all(len(text) > at - 20 for at, text in enumerate(shown))
    assert set(shown[-1]) == {"\ufffd"}


@pytest.mark.parametrize("kind", ["llama2", "gemma", "unigram_bytes"])
def test_a_bad_byte_spoils_no_character_that_was_shown(kind: str) -> None:
    """The decoder itself gives up the whole run of bytes then."""
    ids = [token_id(kind, name) for name in ("<0xE6>", "<0x97>", "<0xA5>", "<0xE2>", "lo", "<0xE2>")]
    assert stream(Tokenizer(backend(kind)), ids) == ["", "", "日", "", "\ufffdlo", "", "\ufffd"]


def test_characters_across_tokens_come_as_soon_as_they_are_whole() -> None:
    """Tokens that end within a character, one after the other, as they do in scripts of which a vocabulary has only bytes."""
    tokenizer = Tokenizer(backend("across_characters"))
    ids = tokenizer.encode("é" * 100)
    assert len(ids) == 101 and all(tokenizer.decode([token]) != "é" for token in ids)
    assert stream(tokenizer, ids) == ["", *["é"] * 100, ""]


@pytest.mark.parametrize("kind", ["llama2", "unigram", "word_piece", "words"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_within_a_text_takes_no_space_away(kind: str, skip: bool) -> None:
    tokenizer = Tokenizer(backend(kind))
    space = tokenizer.encode_plain("the the")[1:]
    special = token_id(kind, "<|im_end|>")
    unknown = backend(kind).get_vocab_size() + 7
    for ids in ([special, *space, special, unknown, *space], [*space, special, special, *space], [unknown, *space]):
        assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)
    assert " the" in tokenizer.decode([*space, special, *space], skip).removeprefix(" ")


@pytest.mark.parametrize("kind", ["llama2", "unigram"])
def test_the_first_piece_loses_the_space_that_was_put_before_it(kind: str) -> None:
    tokenizer = Tokenizer(backend(kind))
    shown = list(accumulate(stream(tokenizer, tokenizer.encode("the loba"))))
    assert not any(text.startswith(" ") for text in shown) and shown[-1] == "the loba"


@given(st.text(alphabet=" .?!,'nmstvrex", max_size=24), st.integers(1, 5))
@settings(max_examples=1500, deadline=None)
@example(" n ' t", 1)
@example("  ' ve", 1)
def test_a_streamed_clean_up_of_spaces_is_that_of_transformers(text: str, step: int) -> None:
    expected = AUTO.clean_up_tokenization(text)
    assert clean(text) == expected
    shown, tail = "", ""
    for at in range(0, len(text), step):
        piece, tail = clean_settled(tail + text[at : at + step])
        assert not tail.isalpha() and not shown.endswith((" ", "'"))
        shown += piece
    assert shown + clean(tail) == expected


AUTO = AutoTokenizer.from_pretrained(demo_path())


@pytest.mark.parametrize("cleans_up", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_ids_are_those_of_auto_tokenizer(kind: str, cleans_up: bool, tmp_path: Path) -> None:
    save(backend(kind), tmp_path, clean_up_tokenization_spaces=cleans_up, eos_token="</s>")
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None and ours.eos_token_id == theirs.eos_token_id == token_id(kind, "</s>")
    rng = random.Random(0)
    texts = [*corpus(240), "", " ", "the <|im_end|> the .", "do n't , né 's <tool> \ufffd"]
    samples = [[rng.randrange(backend(kind).get_vocab_size()) for _ in range(30)] for _ in range(20)]
    for ids in [ours.encode(text) for text in texts] + samples:
        for skip in (True, False):
            whole = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip) == whole
            assert "\ufffd" in whole or "".join(stream(ours, ids, skip)) == whole
    assert [ours.encode(text) for text in texts] == theirs(texts)["input_ids"]


def flags(content: str, special: bool, **others: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, "special": special} | plain | others


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": {"9001": flags("<b>", False), "9000": flags("<a>", True, lstrip=True)}}, {}),
        ({"added_tokens_decoder": {"10000": flags("<b>", False), "9000": flags("<a>", True)}}, {}),
        ({"added_tokens_decoder": {"3": flags("<|im_start|>", False), "9": flags("<tool>", True)}}, {}),
        ({"added_tokens_decoder": {"9": flags("the", True)}}, {}),
        ({"pad_token": "<a>", "eos_token": {"__type": "AddedToken", **flags("<b>", False, rstrip=True)}, "cls_token": None}, {}),
        ({"pad_token": "<tool>"}, {}),
        ({"pad_token": "<tool>", "added_tokens_decoder": {}}, {}),
        ({"image_token": "<a>", "additional_special_tokens": ["<b>", "<tool>"]}, {}),
        ({"extra_special_tokens": {"boi_token": "<a>"}, "bos_token": "<b>"}, {}),
        ({"eos_token": "<a>"}, {"special_tokens_map.json": {"eos_token": "<b>"}, "added_tokens.json": {"<tool>": 7, "<c>": 9}}),
    ],
    ids=str,
)
def test_tokens_are_added_as_by_auto_tokenizer(config: dict[str, Any], files: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("byte_level", "llama2", "word_piece"):
        save(backend(kind), tmp_path, **config)
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert ours is not None and ours.eos_token_id == theirs.eos_token_id
        for text in ("a <a> the <b> x <c>the", "the<b><tool> <|im_start|> <a><a>"):
            ids = ours.encode(text)
            assert ids == theirs(text)["input_ids"]
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_added_tokens_of_another_form_are_refused(tmp_path: Path) -> None:
    for entries in ({"x": flags("<a>", True)}, {"9": 5}, {"9": {"special": True}}, [1]):
        save(backend("words"), tmp_path, added_tokens_decoder=entries)
        with pytest.raises(ModelError, match=r"the tokenizer in .* can't be loaded"):
            Tokenizer.load(tmp_path)


def test_prompts_are_neither_cut_nor_padded_whatever_the_file_says(tmp_path: Path) -> None:
    trained = KINDS["byte_level"]()
    trained.enable_truncation(3)
    trained.enable_padding(length=20)
    save(trained, tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    for text in ("the", corpus(24)[0]):
        assert ours.encode(text) == backend("byte_level").encode(text).ids == theirs(text)["input_ids"]


def test_vocab_and_merges_are_read_without_a_tokenizer_json(tmp_path: Path) -> None:
    model = json.loads(backend("byte_level").to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    for text in corpus(240):
        assert tokenizer.encode(text) == backend("byte_level").encode(text).ids
        assert "".join(stream(tokenizer, tokenizer.encode(text))) == text


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


def test_a_tokenizer_that_cannot_be_loaded_is_an_error_that_says_why(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match="has a tokenizer_config"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05no")
    with pytest.raises(ModelError, match="can't be loaded"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="Model missing"):
        Tokenizer.load(tmp_path)
    save(backend("words"), tmp_path)
    config.write_text("[1]")
    with pytest.raises(ModelError, match="holds no JSON object"):
        Tokenizer.load(tmp_path)


def test_text_that_is_no_unicode_is_refused() -> None:
    tokenizer = Tokenizer(backend("byte_level"))
    for encode in (tokenizer.encode, tokenizer.encode_plain):
        with pytest.raises(InvalidRequestError, match="lone surrogate"):
            encode("a\ud800")

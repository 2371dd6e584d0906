"""Tiny tokenizers of every kind that checkpoints bring, built by the tokenizers library."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def corpus(words: int = 3000) -> list[str]:
    """Words over a few syllables and scripts, with punctuation; the same every time."""
    rng = random.Random(0)
    syllables = ["ba", "lo", "mi", "the", "ing", "né", "ß", "日本", "語", "при", "вет", "😀", "x1", "'s", "n't"]
    text = [rng.choice(["", " ", "  "]) + "".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(words)]
    return [" ".join(text[at : at + 12]) + rng.choice([".", " ,", "!\n", "\n\n", "?"]) for at in range(0, words, 12)]


def byte_level(prefix: bool = False) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=[*SPECIAL]))


def across_characters() -> Tokenizer:
    """Byte-level BPE without a pre-tokenizer's borders, whose tokens end in the middle of characters more often than not."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    symbols = sorted(alphabet)
    rng = random.Random(1)
    merges = [("©", "Ã"), *((rng.choice(symbols), rng.choice(symbols)) for _ in range(600))]  # é is Ã©
    merges = list(dict.fromkeys(merges))
    pieces = dict.fromkeys([*SPECIAL, *symbols, *(first + second for first, second in merges)])
    tokenizer = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer)


def llama2() -> Tokenizer:
    """SentencePiece BPE with byte fallback; a space is put before the text and taken off again."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def gemma() -> Tokenizer:
    """SentencePiece BPE with byte fallback and nothing put before the text."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram() -> Tokenizer:
    """Unigram with Metaspace, as T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _trained(tokenizer, trainers.UnigramTrainer(vocab_size=300, special_tokens=[*SPECIAL], unk_token="<unk>"))


def unigram_bytes() -> Tokenizer:
    """Unigram with byte fallback, as XGLM's successors."""
    trained = json.loads(unigram().to_str())["model"]["vocab"]
    vocab = [*map(tuple, trained), *((byte, -20.0) for byte in BYTES)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _with_special(tokenizer)


def word_piece() -> Tokenizer:
    """WordPiece, as BERT: pieces within a word begin with ##."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*SPECIAL]))


def characters() -> Tokenizer:
    """One token per character."""
    alphabet = sorted({character for line in corpus() for character in line})
    tokenizer = Tokenizer(models.WordLevel({name: at for at, name in enumerate([*SPECIAL, *alphabet])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _with_special(tokenizer)


def suffixes() -> Tokenizer:
    """BPE whose words end in </w>, as the first GPT: a space follows every word but the last."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL], end_of_word_suffix="</w>")
    return _trained(tokenizer, trainer)


def words() -> Tokenizer:
    """Whole words, joined by spaces, without a decoder."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(tokenizer, trainers.WordLevelTrainer(vocab_size=200, special_tokens=[*SPECIAL]))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (
        byte_level, across_characters, llama2, gemma, unigram, unigram_bytes, word_piece, characters, suffixes, words
    )
}  # fmt: skip
EVERY_TEXT = ("byte_level", "across_characters", "llama2", "gemma")  # those that give every text back as it was


@cache
def backend(kind: str) -> Tokenizer:
    """The tokenizer of a kind of KINDS."""
    return KINDS[kind]()


def save(tokenizer: Tokenizer, path: Path, **config: Any) -> Path:
    """A checkpoint's tokenizer files; `config` goes to tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    return path


def _sentencepiece() -> Tokenizer:
    """Byte tokens, characters and some merges of them; spaces are ▁."""
    lines = [line.replace(" ", "▁") for line in corpus()]
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, limit_alphabet=40, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    vocab = {piece: at for at, piece in enumerate(dict.fromkeys([*SPECIAL, *BYTES, *learned["vocab"]]))}
    merges = [tuple(merge) for merge in learned["merges"]]
    return _with_special(Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)))


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    trainer.show_progress = False
    tokenizer.train_from_iterator(corpus(), trainer)
    return _with_special(tokenizer)


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([*SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])  # added, and shown
    return tokenizer

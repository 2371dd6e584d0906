"""A checkpoint with a tokenizer: some peers load or convert none without, though only ids go in and out."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def with_tokenizer(model: Path, folder: Path) -> Path:
    """A directory with links to the files of `model`, and with a tokenizer whose tokens are the bytes and made-up words."""
    path = folder / "checkpoint"
    if (path / "tokenizer_config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if not (path / file.name).exists():
            (path / file.name).symlink_to(file.resolve())
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *letters]
    words += [f"t{index}" for index in range(len(words), size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path

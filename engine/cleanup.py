"""The clean-up of spaces before punctuation that transformers applies to the text of some word-piece and unigram tokenizers."""

from __future__ import annotations

import re

# In the order in which they are replaced, each by itself without spaces: clean_up_tokenization_spaces in transformers.
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# The last characters after which one of them could go on, also once another has been replaced (" n ' t" is "n't").
_UNSETTLED = re.compile(r"(?:[ ']|(?<= )n|(?<=')[vr]|(?<=' )[vr])+\Z")


def clean(text: str) -> str:
    """The text without the spaces that such tokenizers put before punctuation and contractions."""
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.strip())
    return text


def clean_settled(text: str) -> tuple[str, str]:
    """What no later text can change, cleaned, and the end of `text` that has to wait."""
    unsettled = _UNSETTLED.search(text)
    settled = unsettled.start() if unsettled else len(text)
    return clean(text[:settled]), text[settled:]

"""The tokens of a slot whose logits are not the model's own: seen, banned or biased ones, in a hash table per slot.

It is kept from step to step: a token that is fed changes one cell, a fork copies a row. Beside the cells, a bit per
token says which ones the table holds, 64 to a word as tokens are grouped in the statistics, and a list names the groups
that have any.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenTable(NamedTuple):
    """S slots, C cells each (a power of two), G groups of the vocabulary."""

    cells: Tensor  # int32 [S, C, CELL], see adjusted.py
    bits: Tensor  # int64 [S, G], bit i of word g: the token 64 g + i has a cell
    touched: Tensor  # int32 [S, G], groups with a bit set, in any order
    touched_count: Tensor  # int32 [S], how many they are

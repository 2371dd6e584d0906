"""What a request cost, and the record of how its outputs came about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(slots=True)
class Counters:
    """Totals since the start. Tokens, except where named otherwise."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    forward_tokens: int = 0
    blocks_copied: int = 0


class Usage(msgspec.Struct):
    """Totals of one request.

    forward_tokens: tokens computed for it, recomputed ones too. forks: sequences that began as copies of others, blocks and
    all. blocks_copied: blocks copied on write. blocks_freed: blocks that its sequences let go while it ran.
    shared_block_ratio: of the blocks that its sequences would hold if none shared, the part that was not needed; as measured
    last, which is done anew whenever they would hold more than 9/8 of the blocks of the time before.
    """

    forward_tokens: int = 0
    forks: int = 0
    blocks_copied: int = 0
    blocks_freed: int = 0
    shared_block_ratio: float = 0.0


class Trace(msgspec.Struct):
    """How the outputs came about. `steps` are Structs of the strategy; `complete`: none were left out for their number."""

    strategy: str
    steps: list[Any]
    usage: Usage
    complete: bool = True

"""Finding blocks by the tokens that lead to them: an exact trie, no hash of content to collide."""

from __future__ import annotations

from itertools import count

import numpy as np

from .block_pool import BlockPool
from .plan import Ints


class PrefixCache:
    """Maps (uid of the parent block, the tokens of a full block) to a block of the pool.

    A uid is fresh for every publication, so when a parent is evicted and its place reused, its old children
    can't be found under the new content. `salt` separates caches (tenants); each has a root uid of its own.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._step = 4 * block_size  # bytes of a block's int32 tokens
        self._found: dict[tuple[int, bytes], tuple[int, int]] = {}  # block and its uid
        self._key: dict[int, tuple[int, bytes]] = {}
        self._roots: dict[str, int] = {}
        self._uids = count(1)
        pool.forget = self._forget

    def root(self, salt: str = "") -> int:
        """The uid that the first block of a prompt hangs on."""
        if salt not in self._roots:
            self._roots[salt] = next(self._uids)
        return self._roots[salt]

    def take(self, root: int, tokens: Ints, max_blocks: int) -> Ints:
        """The longest published run of leading blocks, at most `max_blocks`.

        The blocks are pinned here: between finding and holding a block nothing can evict it.
        """
        data = tokens.tobytes()
        step, find = self._step, self._found.get
        blocks: list[int] = []
        uid = root
        for begin in range(0, max_blocks * step, step):
            entry = find((uid, data[begin : begin + step]))
            if entry is None:
                break
            block, uid = entry
            blocks.append(block)
        found = np.array(blocks, np.int32)
        self._pool.retain(found)
        return found

    def publish(self, parent: int, tokens: bytes, block: int) -> int:
        """Make a full, computed block findable; the block that is found from now on.

        Where the same content is findable already, that is the block which held it first.
        """
        key = (parent, tokens)
        known = self._found.get(key)
        if known is not None:
            return known[0]
        uid = next(self._uids)
        self._found[key] = block, uid
        self._key[block] = key
        self._pool.publish(block, uid)
        return block

    def _forget(self, block: int) -> None:
        del self._found[self._key.pop(block)]

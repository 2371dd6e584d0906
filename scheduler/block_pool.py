"""Reference counts of cache blocks. Blocks are numbers; nobody here knows what is in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from .errors import BlockAccountingError
from .plan import Ints, Longs

SINK = 0  # padding rows write here; it is never handed out
_ONE = np.int32(1)  # ufunc.at is many times slower with a number of another type than its array


class BlockPool:
    """`num_blocks` blocks, block 0 being the padding sink.

    refs[b] counts the tables that hold b, filled[b] the tokens written to it, uid[b] names its published
    content (0: not published). A published block that nobody holds stays findable until its place is needed:
    free blocks without content go first, then the least recently released.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs: Ints = np.zeros(num_blocks, np.int32)
        self.filled: Ints = np.zeros(num_blocks, np.int32)
        self.uid: Longs = np.zeros(num_blocks, np.int64)
        self.refs[SINK] = 1
        self.forget: Callable[[int], None] = lambda block: None  # told when published content is overwritten
        self._blank = list(range(num_blocks - 1, SINK, -1))
        # Published blocks, least recently released first. Held ones may linger: pinning them need not touch this.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._idle = 0  # published and held by nobody

    @property
    def free(self) -> int:
        """Blocks that allocate() can give, cached ones nobody holds included."""
        return len(self._blank) + self._idle

    @property
    def cached(self) -> int:
        """Published blocks that nobody holds."""
        return self._idle

    def allocate(self, count: int) -> Ints:
        """`count` empty blocks with one reference each. The caller has checked `free`."""
        if count > self.free:
            raise BlockAccountingError(f"{count} blocks asked of {self.free} free ones")
        taken = self._blank[len(self._blank) - min(count, len(self._blank)) :]
        del self._blank[len(self._blank) - len(taken) :]
        while len(taken) < count:
            taken.append(self._evict())
        blocks = np.array(taken, np.int32)
        self.refs[blocks] = 1
        self.filled[blocks] = 0
        return blocks

    def _evict(self) -> int:
        while True:
            block, _ = self._cached.popitem(last=False)
            if self.refs[block] == 0:
                self._idle -= 1
                self.uid[block] = 0
                self.forget(block)
                return block

    def publish(self, block: int, uid: int) -> None:
        """Mark a held block's content as `uid`: from now on it must not be written."""
        self.uid[block] = uid

    def unpublish(self, block: int) -> None:
        """Take a block's content out of the cache, whoever holds it."""
        if self.uid[block]:
            self.uid[block] = 0
            self.forget(block)
            if self.refs[block] == 0:
                self._idle -= 1
                self._blank.append(block)
            self._cached.pop(block, None)

    def retain(self, blocks: Ints) -> None:
        """One more reference for every entry; repeats count, block 0 stands for "no block"."""
        self._idle -= int(np.count_nonzero(self.refs[blocks] == 0)) if blocks.size else 0
        np.add.at(self.refs, blocks, _ONE)
        self.refs[SINK] = 1

    def release(self, blocks: Ints) -> Ints:
        """One reference less for every entry; the blocks that nobody holds after that.

        Entries are given in table order, so that tails are evicted before heads.
        """
        np.subtract.at(self.refs, blocks, _ONE)
        self.refs[SINK] = 1
        freed: Ints = blocks[self.refs[blocks] == 0]
        if freed.size == 0:
            return freed
        if freed.size > 1:
            freed = freed[np.sort(np.unique(freed, return_index=True)[1])[::-1]]
        published = self.uid[freed] != 0
        if published.any():
            for block in freed[published].tolist():
                self._cached.pop(block, None)
                self._cached[block] = None
                self._idle += 1
            self._blank += freed[~published].tolist()
        else:
            self._blank += freed.tolist()
        return freed

    def check(self, held: Ints) -> None:
        """Raise BlockAccountingError unless references equal `held` (every reference of every table, flat)."""
        expected = np.bincount(held, minlength=self.num_blocks)
        expected[SINK] = 1
        wrong = np.flatnonzero(expected != self.refs)
        if wrong.size:
            block = int(wrong[0])
            raise BlockAccountingError(f"block {block} has {self.refs[block]} references, the tables hold {expected[block]}")
        referenced = int(np.count_nonzero(self.refs[1:]))
        if self.free + referenced != self.num_blocks - 1:
            raise BlockAccountingError(f"{self.free} free and {referenced} referenced blocks, of {self.num_blocks - 1}")
        idle = np.flatnonzero((self.refs == 0) & (self.uid != 0)).tolist()
        if len(idle) != self._idle or not self._cached.keys() >= set(idle):
            raise BlockAccountingError(f"{len(idle)} cached blocks nobody holds, {self._idle} counted")

"""Lists of different lengths, one per slot, gathered and copied without a loop over slots."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Ragged:
    """One immutable list of items per slot, in one array; copies share their items."""

    def __init__(self, slots: int, dtype: Any) -> None:
        self._items: NDArray[Any] = np.empty(0, dtype)
        self._used = 0
        self._begin = np.zeros(slots, np.int64)
        self._count = np.zeros(slots, np.int64)

    def set(self, slot: int, items: NDArray[Any]) -> None:
        self._count[slot] = 0
        if self._used + len(items) > len(self._items):
            self._compact(len(items))
        self._begin[slot], self._count[slot] = self._used, len(items)
        self._items[self._used : self._used + len(items)] = items
        self._used += len(items)

    def copy(self, src: NDArray[Any], dst: NDArray[Any]) -> None:
        self._begin[dst], self._count[dst] = self._begin[src], self._count[src]

    def any(self, slots: NDArray[Any]) -> NDArray[np.bool_]:
        """Whose list has items, [P]."""
        found: NDArray[np.bool_] = self._count[slots] > 0
        return found

    def gather(self, slots: NDArray[Any], wanted: NDArray[np.bool_] | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The items of the lists of `slots` [P] (of those `wanted`), one list after the other: index into slots [N], item [N]."""
        count = self._count[slots] if wanted is None else self._count[slots] * wanted
        if not count.any():
            return np.empty(0, np.int64), self._items[:0]
        row = np.repeat(np.arange(len(slots)), count)
        shift = self._begin[slots] - (count.cumsum() - count)
        return row, self._items[shift[row] + np.arange(len(row))]

    def _compact(self, more: int) -> None:
        """Drops the lists that no slot has any longer and makes room for `more` items."""
        live = self._count.nonzero()[0]
        begins, owner, which = np.unique(self._begin[live], return_index=True, return_inverse=True)
        _, items = self.gather(live[owner])
        count = self._count[live[owner]]
        self._begin[live] = (count.cumsum() - count)[which] if len(begins) else 0
        self._used = len(items)
        self._items = np.empty(2 * (len(items) + more), items.dtype)
        self._items[: len(items)] = items

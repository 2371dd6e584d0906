"""Who goes first: the waiting queue and its order."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from .group import Group, State

LOOK_AHEAD = 8  # groups behind a head that doesn't fit which may be tried in its place
MAX_BYPASSES = 16  # times that a head lets others pass before everyone waits for it


class WaitingQueue:
    """Waiting groups by Group.order: priority (lower first), then arrival. A preempted group keeps its place."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], int, Group]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, group: Group) -> None:
        heapq.heappush(self._heap, (group.order, group.number, group))
        self._size += 1

    def discard(self) -> None:
        """A waiting group has ended. Its entry is skipped when it comes up, unless such entries are the most: then they go."""
        self._size -= 1
        if len(self._heap) > 2 * self._size + LOOK_AHEAD:
            self._heap = [entry for entry in self._heap if entry[2].state is State.WAITING]
            heapq.heapify(self._heap)

    def admit(self, fits: Callable[[Group], bool | None]) -> list[Group]:
        """Take out the groups that fit, in order, passing a few that don't, each a limited number of times.

        `fits` returns None for a group that isn't ready, through no lack of room: it holds nobody up.
        """
        admitted: list[Group] = []
        passed: list[Group] = []
        unready: list[Group] = []
        while self._heap and len(passed) < LOOK_AHEAD and not (passed and passed[0].bypassed >= MAX_BYPASSES):
            group = heapq.heappop(self._heap)[2]
            if group.state is not State.WAITING:
                continue
            self._size -= 1
            fit = fits(group)
            (unready if fit is None else admitted if fit else passed).append(group)
            if fit:
                for other in passed:
                    other.bypassed += 1
        for group in passed + unready:
            self.push(group)
        return admitted

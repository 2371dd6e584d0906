"""The trace of a beam search: what was considered in each step, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ._hypotheses import Nodes, Search

_TRACED = 10_000  # entries of a trace


class BeamStep(msgspec.Struct, tag="beam"):
    """The candidates of one step: the best of each group, best first within a group.

    step: 1 is that of the first generated token. parent: index of the candidate that it continues in the lists of the step
    before, -1: the prompt. logprob: of this token after processing, the diversity penalty taken off. cumulative: the sum so
    far. fate: "kept" runs on, "finished" was offered to the pool, "pruned" is neither.
    """

    step: int
    parent: list[int] = []
    group: list[int] = []
    token: list[int] = []
    logprob: list[float] = []
    cumulative: list[float] = []
    fate: list[str] = []


class Recorder:
    """Keeps the steps of a trace, up to a number of entries."""

    def __init__(self, groups: int) -> None:
        self.steps: list[BeamStep] = []
        self._room = _TRACED
        self._entries = [[-1]] * groups  # where each group's beams are in the lists of the last step

    def add(self, step: BeamStep, group: int, search: Search, before: list[float], found: Nodes, run: Sequence[int]) -> None:
        """The candidates of a group; `before` are the scores of its beams, `run` the candidates that run on."""
        count = len(found.token)
        fate = ["pruned"] * count
        for index in run:
            fate[index] = "kept"
        for index in search.ended:
            fate[index] = "finished"
        first = len(step.token)
        step.parent += [self._entries[group][parent] for parent in found.parent]
        step.group += [group] * count
        step.token += found.token
        step.logprob += [score - before[parent] for score, parent in zip(found.score, found.parent, strict=True)]
        step.cumulative += found.score
        step.fate += fate
        self._entries[group] = [first + index for index in run]

    def end(self, step: BeamStep) -> bool:
        """Keep the step unless it is too much; whether it was kept. Without it those after it would have no parents."""
        self._room -= len(step.token)
        if self._room >= 0:
            self.steps.append(step)
        return self._room >= 0

"""Graphs without a GPU: what would be recorded is run again, on the same buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pagefork import LLM
from pagefork.capture import CudaCapture, Outputs
from pagefork.graph import Forward, StepGraphs
from pagefork.runner import ModelRunner
from pagefork.scheduler.plan import Plan


def run_again(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """A Capture. As a graph does, a replay writes what it finds where the first run left it."""
    found = run()

    def replay() -> None:
        for kept, fresh in zip(_tensors(found), _tensors(run()), strict=True):
            if kept.data_ptr() != fresh.data_ptr():
                kept.copy_(fresh)

    return replay, found


class SharedPool:
    """A Capture whose replays destroy what other graphs found, as those may that work in one pool of memory."""

    def __init__(self) -> None:
        self._found: list[Any] = []

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        replay, found = run_again(run)
        self._found.append(found)

        def overwriting() -> None:
            for others in self._found:
                if others is not found:
                    self._destroy(others)
            replay()

        return overwriting, found

    def _destroy(self, found: Any) -> None:
        """All but buffers that every graph has."""
        for kept in _tensors(found):
            owners = [any(_memory(kept) == _memory(one) for one in _tensors(other)) for other in self._found]
            if sum(owners) == 1:
                kept.fill_(1)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def with_graphs(model: str, device: torch.device, **settings: Any) -> LLM:
    """An LLM whose steps are replayed, from CUDA graphs where there is a GPU."""
    if device.type == "cuda":
        return LLM(model, device="cuda", cuda_graphs=True, **settings)

    def make(*args: Any) -> ModelRunner:
        return ModelRunner(*args[:5], capture=run_again)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagefork.build.ModelRunner", make)
        return LLM(model, device="cpu", **settings)


@contextmanager
def overlapping() -> Iterator[None]:
    """Engines made here submit a step to their runner before they collect the one before it, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagefork.core.runner_for", lambda runner, overlap, device: runner)
        yield


def capture_on(device: torch.device) -> Any:
    """The Capture that a device has."""
    return CudaCapture(device) if device.type == "cuda" else run_again


@contextmanager
def steps_seen() -> Iterator[list[tuple[Plan, Forward | None]]]:
    """The steps of all runners that have graphs: what was planned, and what a graph found; None if it was launched."""
    seen: list[tuple[Plan, Forward | None]] = []
    run = StepGraphs.run

    def noting(graphs: StepGraphs, plan: Plan) -> Forward | None:
        seen.append((plan, run(graphs, plan)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGraphs, "run", noting)
        yield seen

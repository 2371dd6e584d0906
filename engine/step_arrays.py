"""What the kernels of a step are told of its rows: arrays of int32, by name, in one buffer that is uploaded at once.

A step that is launched and one that a graph replays have the same layout. A graph's has the sizes of its bucket; the
records of attention, whose number changes from step to step, come last, so that only what is used has to be copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pagefork.kernels.attention_tasks import Tasks, plan_tasks
from pagefork.scheduler.plan import Ints, Rows, ints

if TYPE_CHECKING:
    from pagefork.models.config import ModelConfig

_ALIGNED = 4  # words: 16 bytes, which kernels can load at once

Shapes = dict[str, tuple[int, ...]]


class Layout:
    """Where arrays lie in a buffer of `words` 32-bit words, in the order that `shapes` has."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes, self._begin, words = shapes, dict[str, int](), 0
        for name, shape in shapes.items():
            self._begin[name] = words
            words += -(-prod(shape) // _ALIGNED) * _ALIGNED
        self.words = words

    def write(self, buffer: Ints, arrays: Mapping[str, Ints]) -> int:
        """Puts arrays in their places in int32 [words] or more, and returns where the last of them ends.

        An array may have fewer rows than its place: what follows is left as it is, as are places without an array. Raises
        ValueError for one that does not fit.
        """
        end = 0
        for name, array in arrays.items():
            rows, *inner = self._shapes[name]
            if len(array) > rows or list(array.shape[1:]) != inner:
                raise ValueError(f"{name} has room for {[rows, *inner]}; given {list(array.shape)}")
            begin = self._begin[name]
            buffer[begin : begin + array.size] = array.ravel()
            end = max(end, begin + array.size)
        return end

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The arrays in int32 [words] or more on the device."""
        places = ((name, self._begin[name], shape) for name, shape in self._shapes.items())
        return {name: buffer[begin : begin + prod(shape)].view(shape) for name, begin, shape in places}


@dataclass(frozen=True, slots=True)
class StepArrays:
    """T tokens, padded to N; the padding is written to block 0, which nobody reads, and sees nothing."""

    tokens: int  # T
    padded: int  # N
    tasks: dict[int | None, Tasks]  # by sliding window
    arrays: dict[str, Ints]  # as `step_shapes` has them

    @property
    def parts(self) -> int:
        """How many partial results a layer has at most."""
        return max(int(tasks.part[-1]) for tasks in self.tasks.values())

    @property
    def records(self) -> int:
        """How many tasks a layer has at most."""
        return max(len(tasks.records) for tasks in self.tasks.values())


def step_shapes(windows: int, padded: int, records: list[int], **more: tuple[int, ...]) -> Shapes:
    """The arrays of a step with so many tokens, and records for each of its windows; `more` go before the records.

    tokens (LAST_TOKEN included), slots, positions, blocks, offsets: [N]; count [windows], records of each window; part0,
    part1, ...: [N + 1]; records0, records1, ...: [tasks, 6], by window.
    """
    shapes: Shapes = dict.fromkeys(("tokens", "slots", "positions", "blocks", "offsets"), (padded,))
    shapes |= {"count": (windows,), **{f"part{i}": (padded + 1,) for i in range(windows)}, **more}
    return shapes | {f"records{i}": (count, 6) for i, count in enumerate(records)}


def step_arrays(
    rows: Rows, tables: Ints, config: ModelConfig, block_size: int, padded: int, batch_invariant: bool = False
) -> StepArrays:
    """Of rows whose blocks are tables[slot], padded to `padded` tokens.

    Raises ValueError if there are no rows, one has no tokens or outgrows its table.
    """
    length, count = check_rows(rows, tables, block_size)
    slots = np.repeat(rows.slot, length)
    positions = np.arange(count, dtype=np.int32) + np.repeat(rows.start - rows.offset[:-1], length)
    blocks, offsets = tables[slots, positions // block_size], positions % block_size
    group = config.num_attention_heads // config.num_kv_heads
    tasks = {
        window: plan_tasks(
            rows.slot,
            rows.start,
            length,
            rows.trunk,
            group=group,
            block_size=block_size,
            window=window,
            invariant=batch_invariant,
        )
        for window in dict.fromkeys(config.windows)
    }
    flat = {"tokens": rows.tokens, "slots": slots, "positions": positions, "blocks": blocks, "offsets": offsets}
    arrays = {name: _padded(array, padded) for name, array in flat.items()}
    arrays["count"] = ints([len(found.records) for found in tasks.values()])
    for i, found in enumerate(tasks.values()):
        arrays[f"part{i}"] = _padded(found.part, padded + 1, -1)
    arrays |= {f"records{i}": found.records for i, found in enumerate(tasks.values())}
    return StepArrays(count, padded, tasks, arrays)


def check_rows(rows: Rows, tables: Ints, block_size: int) -> tuple[Ints, int]:
    """The lengths of rows and the number of their tokens.

    Raises ValueError if there are no rows, one has no tokens or outgrows its table.
    """
    length, count = np.diff(rows.offset), int(rows.offset[-1])
    if not len(length) or len(rows.tokens) != count:
        raise ValueError(f"{len(length)} rows of {count} tokens in all, but {len(rows.tokens)} tokens are given")
    if length.min() < 1 or (rows.start + length).max() > tables.shape[1] * block_size:
        raise ValueError(f"rows need at least one token and at most {tables.shape[1]} blocks of {block_size}")
    return length, count


def _padded(array: Ints, size: int, fill: int = 0) -> Ints:
    """int32 [size], with `fill` at the end."""
    found = np.empty(size, np.int32)
    found[: len(array)], found[len(array) :] = array, fill
    return found

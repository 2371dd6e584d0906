"""The arrays of a step come out of the buffer that is uploaded as a loop over its rows would make them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.checkpoints import SIZES

from pagefork.models.config import parse_config
from pagefork.scheduler.plan import LAST_TOKEN, Rows, ints
from pagefork.step_arrays import Layout, StepArrays, step_arrays, step_shapes

SLIDING = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "max_position_embeddings": 64}
CONFIG = parse_config({**SIZES, **SLIDING, "architectures": ["Qwen2ForCausalLM"]})
TABLES = np.random.default_rng(0).permutation(60).reshape(5, 12).astype(np.int32) + 1
ROWS = [(3, 17, 1), (0, 0, 6), (4, 7, 5), (1, 31, 1), (2, 40, 8)]  # slot, start, length


def arrays_of(rows: list[tuple[int, int, int]], padded: int) -> StepArrays:
    """Tokens counted up, but for the first, which is the one that its slot drew."""
    slot, start, length = zip(*rows, strict=True)
    tokens = ints([LAST_TOKEN, *range(1, sum(length))])
    given = Rows(ints(slot), ints(start), ints(np.cumsum([0, *length])), tokens, np.empty((0, 3), np.int32))
    return step_arrays(given, TABLES, CONFIG, 4, padded)


@pytest.mark.parametrize("padded", [21, 30])
def test_what_is_uploaded_says_what_a_loop_over_the_rows_would(padded: int) -> None:
    step = arrays_of(ROWS, padded)
    layout = Layout({name: array.shape for name, array in step.arrays.items()})
    buffer = np.full(layout.words, -7, np.int32)
    layout.write(buffer, step.arrays)
    views = layout.views(torch.from_numpy(buffer))
    assert all(view.data_ptr() % 16 == views["tokens"].data_ptr() % 16 for view in views.values())
    places = [(slot, start + nth) for slot, start, length in ROWS for nth in range(length)]
    expected = {
        "tokens": [LAST_TOKEN, *range(1, 21)],
        "slots": [slot for slot, _ in places],
        "positions": [at for _, at in places],
        "blocks": [TABLES[slot, at // 4] for slot, at in places],
        "offsets": [at % 4 for _, at in places],
    }
    for name, values in expected.items():
        assert views[name].tolist() == [*values, *[0] * (padded - 21)], name
    assert list(step.tasks) == [None, 9]
    assert views["count"].tolist() == [len(tasks.records) for tasks in step.tasks.values()]
    for i, tasks in enumerate(step.tasks.values()):
        np.testing.assert_array_equal(views[f"records{i}"].numpy(), tasks.records)
        np.testing.assert_array_equal(views[f"part{i}"].numpy(), [*tasks.part, *[-1] * (padded - 21)])


def test_fewer_records_than_there_is_room_for_leave_the_rest_as_it_was() -> None:
    step = arrays_of([(3, 17, 1), (1, 31, 1)], 4)
    layout = Layout(step_shapes(2, 4, [6, 9], extra=(4, 3)))
    buffer = np.full(layout.words, -7, np.int32)
    used = layout.write(buffer, step.arrays)
    views = layout.views(torch.from_numpy(buffer))
    begin = (views["records1"].data_ptr() - views["tokens"].data_ptr()) // 4
    assert used == begin + step.tasks[9].records.size
    assert (views["extra"] == -7).all() and (buffer[used:] == -7).all()
    for i, tasks in enumerate(step.tasks.values()):
        assert (views[f"records{i}"][len(tasks.records) :] == -7).all()
        np.testing.assert_array_equal(views[f"records{i}"][: len(tasks.records)].numpy(), tasks.records)


def test_an_array_that_does_not_fit_is_refused() -> None:
    layout = Layout({"records": (2, 6)})
    for shape in ((3, 6), (2, 5)):
        with pytest.raises(ValueError, match=r"records has room for \[2, 6\]"):
            layout.write(np.zeros(layout.words, np.int32), {"records": np.zeros(shape, np.int32)})


def test_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        arrays_of([(0, 0, 3), (1, 4, 0)], 3)
    with pytest.raises(ValueError, match="12 blocks of 4"):
        arrays_of([(0, 46, 3)], 3)

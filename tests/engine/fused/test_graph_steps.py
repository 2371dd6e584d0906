"""A step that is replayed finds, and writes, what the same step does when it is launched: single steps over a random cache."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.graphs import SharedPool, capture_on, steps_seen
from support.kernels import kernel_device
from support.sampling import opens

from pagefork import ConfigError, ModelError
from pagefork.cache import KVCache
from pagefork.kernels.attention_tasks import SPLIT
from pagefork.models.registry import Model, load_model
from pagefork.runner import ModelRunner
from pagefork.scheduler.plan import (
    LAST_TOKEN,
    Copies,
    Forks,
    Kind,
    Plan,
    Probe,
    Reads,
    Rows,
    Spec,
    Tables,
    ints,
)

SLOTS, COLUMNS, SIZE = 8, 20, 16
LENGTH = COLUMNS * SIZE
NO_FORKS, NO_OPENS, NO_TABLES = Forks(ints(), ints(), np.empty(0, np.int64)), opens([], []), Tables(ints(), ints(), ints())
TRUNKS = np.empty((0, 3), np.int32)
SPECS = [
    Spec(prompt_len=1),
    Spec(prompt_len=1, temperature=0.8, seed=1),
    Spec(prompt_len=1, temperature=1.2, top_k=7, top_p=0.9, seed=2, rank=True),
    Spec(prompt_len=1, temperature=0.9, frequency_penalty=0.5, logit_bias=((7, 30.0),)),
]


class Twins:
    """Two runners of one model over caches of the same random content; one replays."""

    def __init__(self, model: Model, device: torch.device, capture: Any) -> None:
        self.graphs, self.launched = (self._runner(model, device, given) for given in (capture, None))
        self.tables = np.random.default_rng(0).permutation(SLOTS * COLUMNS).reshape(SLOTS, COLUMNS).astype(np.int32) + 1
        self.fresh = True

    def _runner(self, model: Model, device: torch.device, capture: Any) -> ModelRunner:
        cache = KVCache(model.config, SLOTS * COLUMNS + 1, SIZE, model.dtype, device, hidden_states=True)
        generator = torch.Generator().manual_seed(0)
        for pages in (cache.k, cache.v, cache.hidden):
            assert pages is not None
            pages.copy_(torch.randn(pages.shape, generator=generator))
        return ModelRunner(model, cache, SLOTS, LENGTH, capture=capture)

    def plan(self, rows: list[tuple[int, int, int]], probes: list[Probe], forks: Forks = NO_FORKS) -> Plan:
        """Rows (slot, start, token), all the slots opened before the first."""
        slot, start, token = zip(*rows, strict=True)
        opened, tables = NO_OPENS, NO_TABLES
        if self.fresh:
            opened = opens(list(range(SLOTS)), [[]] * SLOTS)
            opened.spec = ints([slot % len(SPECS) for slot in range(SLOTS)])
            where = np.indices(self.tables.shape).reshape(2, -1).astype(np.int32)
            tables, self.fresh = Tables(*where, self.tables.ravel()), False
        given = Rows(ints(slot), ints(start), ints(range(len(rows) + 1)), ints(token), TRUNKS)
        return Plan(0, SPECS, forks, ints(), opened, tables, Copies(ints(), ints()), given, probes)

    def step(self, rows: list[tuple[int, int, int]], probes: list[Probe], forks: Forks = NO_FORKS) -> list[Reads]:
        """One plan."""
        return self.compare([self.plan(rows, probes, forks)])[0]

    def compare(self, plans: list[Plan]) -> list[list[Reads]]:
        """Plans that are all submitted to the one before any is collected; checks that both found and wrote the same."""
        for plan in plans:
            self.graphs.submit(plan)
        found, expected = [self.graphs.collect().reads for _ in plans], []
        for plan in plans:
            self.launched.submit(plan)
            expected.append(self.launched.collect().reads)
        for one, other in zip(chain(*found), chain(*expected), strict=True):
            assert_same(one, other)
        for one, other in zip(self.pages(self.graphs), self.pages(self.launched), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert self.graphs._sampler.last.tolist() == self.launched._sampler.last.tolist()
        for tables in (self.graphs._tables, self.launched._tables):
            assert tables.device is not None and tables.device.tolist() == tables.host.tolist()
        return found

    def pages(self, runner: ModelRunner) -> list[torch.Tensor]:
        """All but block 0, where padding goes."""
        assert runner._cache.hidden is not None
        return [runner._cache.k[:, 1:], runner._cache.v[:, 1:], runner._cache.hidden[1:]]


def assert_same(one: Reads, other: Reads) -> None:
    for name in Reads.__struct_fields__:
        found, expected = getattr(one, name), getattr(other, name)
        if isinstance(expected, np.ndarray) and expected.dtype == np.float32:
            np.testing.assert_allclose(found, expected, atol=3e-5, rtol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "mistral", num_hidden_layers=1, sliding_window=300, max_position_embeddings=LENGTH)
    return load_model(path, torch.float32, kernel_device())


@pytest.fixture(scope="module")
def twins(model: Model) -> Twins:
    return Twins(model, kernel_device(), capture_on(kernel_device()))


def rows_at(starts: list[int], token: int = LAST_TOKEN) -> list[tuple[int, int, int]]:
    return [(slot, start, token) for slot, start in enumerate(starts)]


def asked(kind: Kind, rows: int, **fields: Any) -> Probe:
    return Probe(kind, ints(range(rows)), ints(range(rows)), **fields)


def asked_of(rows: list[tuple[int, int, int]], kind: Kind) -> Probe:
    return Probe(kind, ints(range(len(rows))), ints([slot for slot, *_ in rows]), 3)


def test_fewer_rows_after_more_see_nothing_of_them(twins: Twins) -> None:
    """Drawn by graphs that have limits, by graphs that have not, and beside them where penalties count."""
    twins.step(rows_at([SPLIT + 4, *[20] * (SLOTS - 1)], 5), [asked(Kind.SAMPLE, SLOTS)])
    twins.step(rows_at([3, SPLIT + 3, 70]), [asked(Kind.SAMPLE, 3), asked(Kind.TOPN, 3, n=4, processed=True)])
    twins.step(rows_at([4, SPLIT + 4]), [asked(Kind.SAMPLE, 2)])
    twins.step(rows_at([5]), [asked(Kind.SAMPLE, 1), asked(Kind.TOPN, 1, n=2)])
    twins.step(rows_at([6, SPLIT + 5, 71, 90]), [asked(Kind.SAMPLE, 4), asked(Kind.TOPN, 4, n=2, window=ints([0, 9, 30, 0]))])


def test_forks_and_other_read_outs(twins: Twins) -> None:
    twins.step(rows_at([9, 8], 3), [asked(Kind.SAMPLE, 2)])
    forks = Forks(ints([0, 1, 0]), ints([1, 0, 5]), np.array([7, 8, 9]))
    rows = [(0, 10, LAST_TOKEN), (1, 11, LAST_TOKEN), (5, 10, LAST_TOKEN)]
    merge = Probe(Kind.MERGE, ints(range(3)), ints([0, 1, 5]), 4, groups=ints([0, 1, 3]), bias=np.zeros(3, np.float32))
    target = Probe(Kind.TARGET, ints([1]), ints([1]), 2, target=ints([4]))
    found = twins.step(rows, [merge, Probe(Kind.SAMPLE, ints([0, 2]), ints([0, 5])), target], forks)
    assert found[1].token is not None and len(found[1].token) == 2


def test_results_outlive_the_steps_that_begin_before_they_are_collected(model: Model, device: torch.device) -> None:
    """Graphs work in one pool of memory, so that what one found is gone once another is replayed."""
    twins = Twins(model, device, SharedPool() if device.type == "cpu" else capture_on(device))
    greedy = [(0, 9, 4), (4, 8, 5)]
    rows = [greedy, [(slot, start + 1, LAST_TOKEN) for slot, start, _ in greedy], rows_at([11, 7, 5, 3])]
    kinds = [[Kind.SAMPLE], [Kind.SAMPLE, Kind.TOPN], [Kind.SAMPLE]]
    twins.compare([twins.plan(part, [asked_of(part, kind) for kind in read]) for part, read in zip(rows, kinds, strict=True)])


def test_steps_that_no_graph_has_room_for_are_launched(model: Model, device: torch.device) -> None:
    """Here each token may have one partial result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagefork.graph.most_parts", lambda bucket, *_: bucket)
        twins = Twins(model, device, capture_on(device))
    with steps_seen() as seen:
        for starts in ([5, SPLIT, SPLIT], [5, 6, 7]):
            twins.step(rows_at(starts, 3), [asked(Kind.SAMPLE, 3)])
    assert [forward is not None for _, forward in seen] == [False, True]


@pytest.mark.parametrize(
    ("error", "named", "match"),
    [
        (torch.OutOfMemoryError("too much"), ConfigError, "max_num_seqs.*cuda_graphs=False"),
        (RuntimeError("CUDA error: out of memory"), ConfigError, "max_num_seqs.*cuda_graphs=False"),
        (RuntimeError("a sync"), ModelError, r"\(a sync\).*cuda_graphs=False"),
    ],
)
def test_what_can_not_be_recorded_names_the_way_out(
    model: Model, device: torch.device, error: Exception, named: type[Exception], match: str
) -> None:
    def fails(run: Any) -> Any:
        raise error

    cache = KVCache(model.config, 50, SIZE, model.dtype, device)
    with pytest.raises(named, match=match):
        ModelRunner(model, cache, SLOTS, LENGTH, capture=fails)

"""Hidden states in the cache are those of transformers, and similarities read off them those of whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.sampling import opens

from pagefork import LLM, ConfigError
from pagefork.cache import KVCache, block_bytes, hidden_share, num_blocks_for
from pagefork.models.registry import load_model
from pagefork.runner import ModelRunner
from pagefork.scheduler.plan import Copies, Forks, Kind, Plan, Probe, Reads, Rows, Spec, Tables, ints

CPU = torch.device("cpu")
SIZE = 8


class Steps:
    """A runner that is given rows; a slot's blocks are in its table, `own` of them handed out at random."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = load_model(path, dtype, CPU)
        self.cache = KVCache(self.model.config, 100, SIZE, dtype, CPU, hidden_states=True)
        for pages in (self.cache.k, self.cache.v, self.cache.hidden):
            assert pages is not None
            pages.fill_(torch.nan)
        self.runner = ModelRunner(self.model, self.cache, 10, 128)
        self.tables = np.zeros((10, 16), np.int32)
        self.free = iter(np.random.default_rng(0).permutation(99) + 1)

    def run(
        self,
        rows: list[tuple[int, int, list[int]]],
        opened: tuple[int, ...] = (),
        forks: tuple[tuple[int, int], ...] = (),
        probes: tuple[Probe, ...] = (),
    ) -> list[Reads]:
        """Rows (slot, start, tokens). A fork (src, dst) copies the block that dst goes on to write."""
        nothing, copies, deltas = ints(), [], []
        for src, dst in forks:
            self.tables[dst] = self.tables[src]
            start = next(start for slot, start, _ in rows if slot == dst)
            if start % SIZE:
                block = next(self.free)
                copies.append((self.tables[src, start // SIZE], block))
                self.tables[dst, start // SIZE] = block
                deltas.append((dst, start // SIZE, block))
        for slot, start, tokens in rows:
            for column in range(-(-start // SIZE), -(-(start + len(tokens)) // SIZE)):
                self.tables[slot, column] = next(self.free)
                deltas.append((slot, column, self.tables[slot, column]))
        columns = np.array(deltas, np.int32).reshape(-1, 3).T
        pairs, copied = np.array(forks, np.int32).reshape(-1, 2).T, np.array(copies, np.int32).reshape(-1, 2).T
        self.runner.submit(
            Plan(
                step=0,
                specs=[Spec(prompt_len=1)] * len(opened),
                forks=Forks(*pairs, stream=np.zeros(len(forks), np.int64)),
                closes=nothing,
                opens=opens(list(opened), [[]] * len(opened)),
                tables=Tables(*columns),
                copies=Copies(*copied),
                rows=Rows(
                    ints([slot for slot, _, _ in rows]),
                    ints([start for _, start, _ in rows]),
                    ints(np.cumsum([0, *(len(tokens) for _, _, tokens in rows)])),
                    ints([token for _, _, tokens in rows for token in tokens]),
                    np.empty((0, 3), np.int32),
                ),
                probes=list(probes),
            )
        )
        return self.runner.collect().reads

    def held(self, slot: int, count: int) -> torch.Tensor:
        """The states in the blocks of a slot."""
        assert self.cache.hidden is not None
        return self.cache.hidden[torch.from_numpy(self.tables[slot]).long()].flatten(0, 1)[:count].double()


def reference(model: Any, tokens: list[int]) -> torch.Tensor:
    """transformers' last hidden states, of norm 1, float64 [T, D]."""
    with torch.inference_mode():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    return torch.nn.functional.normalize(states.double(), dim=-1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_pages_hold_transformers_states_after_chunks_and_forks_and_give_the_similarity(family: str, tmp_path: Path) -> None:
    sizes = {"gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}}
    model = make_checkpoint(tmp_path, family, **sizes.get(family, {}))
    steps = Steps(tmp_path)
    rng = np.random.default_rng(1)
    first, second = rng.integers(3, 331, 37).tolist(), rng.integers(3, 331, 16).tolist()
    steps.run([(0, 0, first[:5])], opened=(0, 1))
    steps.run([(0, 5, first[5:31]), (1, 0, second)])
    steps.run([(0, 31, first[31:])])
    sequences = [[*first, 7], [*first, 9], [*first, first[20]], [*second, 5], [*second, 7]]
    slots = [2, 0, 3, 4, 1]
    rows = [(slot, len(tokens) - 1, tokens[-1:]) for slot, tokens in zip(slots, sequences, strict=True)]
    windows = [0, 0, 4, 0, 3]
    probe = Probe(Kind.TOPN, ints(range(5)), ints(slots), 3, processed=True, window=ints(windows))
    [reads] = steps.run(rows, forks=((0, 2), (0, 3), (1, 4)), probes=(probe,))
    assert reads.sim is not None and reads.top_p is not None
    for slot, tokens, window, found in zip(slots, sequences, windows, reads.sim, strict=True):
        states = reference(model, tokens)
        torch.testing.assert_close(steps.held(slot, len(tokens)), states, atol=2e-5, rtol=0)
        earlier = states[:-1][-window:] if window else states[:-1]
        assert abs(found - float((earlier @ states[-1]).max())) < 2e-6


def test_a_sequence_of_one_token_resembles_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    probe = Probe(Kind.TOPN, ints([0]), ints([3]), 2, processed=True, window=ints([0]))
    [reads] = Steps(tmp_path).run([(3, 0, [5])], opened=(3,), probes=(probe,))
    assert reads.sim is not None and reads.sim.tolist() == [-1.0]


def test_pages_are_counted_and_copied_with_the_keys(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config = load_model(tmp_path, torch.float32, CPU).config
    cache = KVCache(config, 7, SIZE, torch.bfloat16, CPU, hidden_states=True)
    assert cache.hidden is not None
    assert cache.nbytes == 7 * block_bytes(config, SIZE, torch.bfloat16, hidden_states=True)
    without, extra = block_bytes(config, SIZE, torch.bfloat16), cache.hidden.nbytes // 7
    assert extra == hidden_share(config) * without
    assert num_blocks_for(10 * (without + extra), config, SIZE, torch.bfloat16, hidden_states=True) == 10
    states = cache.hidden.normal_().clone()
    cache.copy_blocks(ints([1, 2]), ints([2, 3]))
    assert torch.equal(cache.hidden, states[[0, 1, 1, 2, 4, 5, 6]])


def test_they_are_kept_where_they_are_cheap_or_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)  # they would add half of the memory of keys and values
    for setting, kept in (("auto", False), (True, True), (False, False)):
        engine = LLM(str(tmp_path), num_blocks=10, hidden_states=setting).engine  # type: ignore[arg-type]
        assert engine.info()["hidden_states"] is kept
    assert LLM("demo", num_blocks=10).engine.info()["hidden_states"] is True
    with pytest.raises(ConfigError, match="hidden_states='yes' is refused"):
        LLM("demo", hidden_states="yes")  # type: ignore[arg-type]

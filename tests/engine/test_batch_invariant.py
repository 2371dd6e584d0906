"""The logits of a position have the same bits however it was computed: alone, with others, in chunks, again, or not again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.feeding import Feeder
from support.torch_path import torch_path
from torch import Tensor

from pagefork import LLM, ConfigError, SamplingParams
from pagefork.demo import demo_path
from pagefork.kernels.native import library
from pagefork.models.registry import Model, load_model

LENGTHS = (620, 270, 40)
WINDOW = {"sliding_window": 150, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 1024}
Feed = Callable[[Feeder, list[list[int]]], list[Tensor]]


@pytest.fixture(scope="module", params=["native", "torch"], autouse=True)
def computed_by(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and library() is None:
        pytest.skip("the native library is not built")
    with torch_path() if request.param == "torch" else nullcontext():
        yield request.param


@pytest.fixture(scope="module", params=["demo", "windows"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return demo_path()
    directory = tmp_path_factory.mktemp("windows")
    make_checkpoint(directory, "mistral", hidden_size=96, **WINDOW)
    return directory


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, path: Path, computed_by: str) -> Model:
    return load_model(path, getattr(torch, request.param), torch.device("cpu"))


@pytest.fixture(autouse=True)
def threads(path: Path) -> Iterator[None]:
    """One thread for one model, two for the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if path == demo_path() else 2)
    yield
    torch.set_num_threads(before)


def sequences(model: Model) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, model.config.vocab_size, length).tolist() for length in LENGTHS]


def feeder(model: Model, batch_invariant: bool = True) -> Feeder:
    return Feeder(model, slots=68, length=704, batch_invariant=batch_invariant)


def one_by_one(feed: Feeder, tokens: list[list[int]]) -> list[Tensor]:
    """A token at a time, alone in the step."""
    return [torch.cat([feed.feed([(slot, at, [t])])[0] for at, t in enumerate(row)]) for slot, row in enumerate(tokens)]


def whole(feed: Feeder, tokens: list[list[int]]) -> list[Tensor]:
    """Each as one prompt, alone."""
    return [feed.feed([(slot, 0, row)])[0] for slot, row in enumerate(tokens)]


def in_chunks(feed: Feeder, tokens: list[list[int]], seed: int = 0) -> list[Tensor]:
    """In chunks of random size, several sequences in a step, in random order."""
    generator, at = np.random.default_rng(seed), [0] * len(tokens)
    found: list[list[Tensor]] = [[] for _ in tokens]
    while left := [slot for slot, row in enumerate(tokens) if at[slot] < len(row)]:
        some = generator.permutation(left)[: generator.integers(1, len(left) + 1)].tolist()
        sizes = [int(generator.choice([1, 2, 9, 33, 64, 100, 250])) for _ in some]
        rows = [(slot, at[slot], tokens[slot][at[slot] : at[slot] + size]) for slot, size in zip(some, sizes, strict=True)]
        for (slot, start, part), logits in zip(rows, feed.feed(rows), strict=True):
            found[slot].append(logits)
            at[slot] = start + len(part)
    return [torch.cat(parts) for parts in found]


def in_a_crowd(feed: Feeder, tokens: list[list[int]]) -> list[Tensor]:
    """Half as prompts, then half a token at a time, in steps of 64 rows and more."""
    generator, vocab = np.random.default_rng(1), feed.model.config.vocab_size
    crowd = range(len(tokens), 64)
    ends = [max(1, len(row) - 20) for row in tokens]
    rows = [(slot, 0, row[:end]) for slot, (row, end) in enumerate(zip(tokens, ends, strict=True))]
    others = [(slot, 0, generator.integers(3, vocab, 1 + 3 * slot % 70).tolist()) for slot in crowd]
    found = [[logits] for logits in feed.feed(rows + others)[: len(tokens)]]
    start = {slot: len(part) for slot, _, part in others}
    for step in range(20):
        rows = [
            (slot, end + step, row[end + step : end + step + 1]) for slot, (row, end) in enumerate(zip(tokens, ends, strict=True))
        ]
        others = [(slot, start[slot] + step, [5 + step]) for slot in crowd]
        for logits, parts in zip(feed.feed(rows + others), found, strict=False):
            parts.append(logits)
    return [torch.cat(parts) for parts in found]


WAYS: list[Feed] = [whole, in_chunks, in_a_crowd]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_logits_have_the_same_bits_in_any_batch(model: Model) -> None:
    tokens = sequences(model)
    expected = one_by_one(feeder(model), tokens)
    for way in WAYS:
        assert same(way(feeder(model), tokens), expected), way.__name__
    assert same(in_chunks(feeder(model), tokens, seed=1), expected)


def test_without_the_promise_bits_differ_but_natively(model: Model, computed_by: str) -> None:
    """Where torch computes; else this file would show nothing."""
    tokens = sequences(model)[:1]
    unchanged = same(whole(feeder(model, False), tokens), in_chunks(feeder(model, False), tokens))
    assert unchanged == (computed_by == "native")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_preemption_and_prefix_hits_change_no_bit(path: Path, dtype: str) -> None:
    """Log-probs of all tokens, at every position that is sampled."""
    generator = np.random.default_rng(3)
    prompts = [generator.integers(3, 300, length).tolist() for length in (290, 130, 260, 33, 200, 17)]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=24, ignore_eos=True, logprobs=-1)

    def run(llm: LLM, batch: list[list[int]]) -> list[list[dict[int, float]]]:
        outputs = llm.generate(batch, params, use_tqdm=False)
        return [[{i: p.logprob for i, p in at.items()} for at in output.outputs[0].logprobs or []] for output in outputs]

    roomy = LLM(str(path), dtype=dtype, num_blocks=400, batch_invariant=True)
    expected = [run(roomy, [prompt])[0] for prompt in prompts]
    assert run(roomy, prompts) == expected  # every prompt is a prefix hit
    assert roomy.engine.stats().prefix_hits > 0
    tight = LLM(
        str(path), dtype=dtype, num_blocks=45, max_num_batched_tokens=48, enable_prefix_caching=False, batch_invariant=True
    )
    assert run(tight, prompts) == expected
    assert tight.engine.stats().preemptions > 0


def test_where_the_promise_can_not_be_kept_it_is_refused(tmp_path: Path, computed_by: str) -> None:
    make_checkpoint(tmp_path, "gpt2")
    with pytest.raises(ConfigError, match="GPT2LMHeadModel runs through transformers"):
        LLM(str(tmp_path), batch_invariant=True)
    with pytest.raises(ConfigError, match="float16 on cpu has no packed linear layers"):
        LLM("demo", dtype="float16", batch_invariant=True)
    assert LLM("demo", num_blocks=32).engine.info()["batch_invariant"] is (computed_by == "native")

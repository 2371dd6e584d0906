"""The engine on a CUDA device: the tokens of a CPU, whatever is switched on. test_devices.py tries the checks on a CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.devices import bits, engine, excused, free_memory, generated, tokens
from support.strategies import PROMPTS, STRATEGIES

from pagefork import LLM
from pagefork.kernels._triton import INTERPRETED

MOST_EXCUSED = 2  # of all outputs: places where two tokens are as good as each other
OFF: dict[str, Any] = {"cuda_graphs": False, "overlap": False}
BACKED: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gemma2": {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 24},
}
Engines = Callable[..., LLM]


@pytest.fixture(scope="module")
def demo_on() -> Iterator[Engines]:
    """The demo model with settings. One engine for all tests that ask for the same: on a GPU each captures its graphs."""
    made: dict[str, LLM] = {}

    def get(device: str, **settings: Any) -> LLM:
        key = repr((device, sorted(settings.items())))
        if key not in made:
            given = {"dtype": "float32", "num_blocks": 1000, "max_num_seqs": 64, "device": device, **settings}
            made[key] = LLM("demo", **given)
        return made[key]

    yield get
    for llm in made.values():
        llm.engine.check()
    made.clear()
    free_memory()


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def encoded(llm: LLM) -> list[list[int]]:
    """The prompts as tokens, and a long one, which takes several splits of attention."""
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    return [*prompts, (prompts[0] * 20)[:600]]


@pytest.mark.parametrize("names", [*([name] for name in STRATEGIES), list(STRATEGIES)], ids=lambda names: "+".join(names)[:20])
def test_every_strategy_gives_the_tokens_of_a_cpu(names: list[str], demo_on: Engines) -> None:
    """In fp32, for itself and all of them in one batch."""
    cpu, cuda = demo_on("cpu"), demo_on("cuda")
    prompts = [prompt for prompt in encoded(cpu) for _ in names]
    params = [STRATEGIES[name]() for name in names] * (len(prompts) // len(names))
    expected = generated(cpu, prompts, params)
    assert excused(cpu, prompts, params, generated(cuda, prompts, params), expected) <= MOST_EXCUSED


@pytest.mark.parametrize(
    ("switched", "dtype"),
    [({"cuda_graphs": False}, "float32"), ({"overlap": False}, "float32"), (OFF, "float32"), (OFF, "bfloat16")],
    ids=str,
)
def test_what_is_switched_off_changes_no_token(switched: dict[str, Any], dtype: str, demo_on: Engines) -> None:
    """Requests of different lengths, so that the batch shrinks from one size of graph to the next."""
    on, off = demo_on("cuda", dtype=dtype), demo_on("cuda", dtype=dtype, **switched)
    makes = list(STRATEGIES.values())
    prompts = [prompt for prompt in encoded(on) for _ in makes]
    params = [makes[index % len(makes)](max_tokens=8 + 2 * index) for index in range(len(prompts))]
    assert tokens(generated(on, prompts, params)) == tokens(generated(off, prompts, params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant_bits(dtype: str, demo_on: Engines) -> None:
    """Alone, among 64, on prefix hits, in chunks, after preemption, and without graphs."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 4000) for _ in range(length)] for length in (290, 130, 260, 33, 200, 17, *range(20, 78))]
    settings: dict[str, Any] = {"dtype": dtype, "batch_invariant": True}
    tight = {"num_blocks": 45, "max_num_batched_tokens": 48, "enable_prefix_caching": False}
    roomy = demo_on("cuda", **settings)
    alone = bits(roomy, prompts[:8], 24, together=1)
    assert bits(roomy, prompts[:8], 24, together=8, crowd=prompts[8:]) == alone
    assert roomy.engine.stats().prefix_hits > 0
    small = demo_on("cuda", **settings, **tight)
    assert bits(small, prompts[:8], 24, together=8) == alone
    assert small.engine.stats().preemptions > 0
    assert bits(demo_on("cuda", **settings, **OFF), prompts[:8], 24, together=8) == alone


@pytest.mark.parametrize("family", BACKED)
def test_models_of_transformers_give_the_tokens_of_a_cpu(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, **BACKED[family])
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 330) for _ in range(length)] for length in (5, 60, 33, 1, 17, 80, 2, 40, 9)]
    params = [make() for make in STRATEGIES.values()]
    with engine(str(tmp_path), device="cpu", hidden_states=True) as cpu:
        expected = generated(cpu, prompts, params)
        with engine(str(tmp_path), device="cuda", hidden_states=True) as cuda:
            assert excused(cpu, prompts, params, generated(cuda, prompts, params), expected) <= MOST_EXCUSED

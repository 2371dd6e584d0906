"""How memory is shared out, decided from measured numbers. The numbers here are invented: no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint

from pagefork import LLM, EngineConfig, SamplingParams
from pagefork import build as build_module
from pagefork.build import _exact_products, _graphs, _load
from pagefork.cache import KVCache, block_bytes
from pagefork.cache_size import Device, cache_blocks
from pagefork.dummy_steps import DummySteps, Span
from pagefork.memory import Needs, cache_room, check_cache, check_weights, running_out
from pagefork.models.registry import Model, load_model, load_outline
from pagefork.models.weights import weights_size
from pagefork.runner import ModelRunner
from pagefork.scheduler.errors import ConfigError
from pagefork.scheduler.plan import LAST_TOKEN, Plan, Result

CPU = torch.device("cpu")
MARGIN = 256 << 20


class InventedMemory:
    """Says what it was told: `peaks` one after another, the last for ever."""

    def __init__(self, free: int, *peaks: int) -> None:
        self.total, self._free, self._peaks = 2 * free, free, list(peaks or (0,))

    def free(self) -> int:
        return self._free

    def begin(self) -> None:
        pass

    def peak(self) -> int:
        return self._peaks.pop(0) if len(self._peaks) > 1 else self._peaks[0]


class Watched:
    """A runner that notes the plans it is given."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner, self.plans = runner, list[Plan]()

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._runner.submit(plan)

    def collect(self) -> Result:
        return self._runner.collect()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load_model(path, torch.float32, CPU)


def sized(model: Model, memory: InventedMemory, length: int = 512, **settings: Any) -> tuple[int, list[Plan]]:
    """Blocks of the cache, and the plans that were run to find out what steps take."""
    runners: list[Watched] = []

    def make_runner(cache: KVCache, length: int) -> Watched:
        runners.append(Watched(ModelRunner(model, cache, config.max_num_seqs, length)))
        return runners[-1]

    config = EngineConfig(model="any", **{"max_num_seqs": 6, "max_num_batched_tokens": 64, **settings})
    blocks = cache_blocks(config, model, length, True, Device(memory, make_runner, graphs=False))
    return blocks, runners[0].plans


def test_the_cache_gets_what_the_weights_the_steps_the_graphs_and_a_margin_leave() -> None:
    assert cache_room(10 << 30, 4 << 30, Needs(2 << 30, 1 << 30), least=1) == (7 << 30) - MARGIN
    assert cache_room(70 << 30, 80 << 30, Needs(2 << 30), least=1) == (68 << 30) - int(0.03 * (80 << 30))


def test_no_room_for_a_cache_is_an_error_that_names_what_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"of the 1000 .* up to 600 .* graphs about 300, .*num_batched.*cuda_graphs=False"):
        cache_room(1000, 1000, Needs(600, 300), least=1)
    assert cache_room(MARGIN + 700, 1000, Needs(600), least=100) == 100
    with pytest.raises(ConfigError) as refusal:
        cache_room(MARGIN + 699, 1000, Needs(600), least=100)
    assert "cuda_graphs" not in str(refusal.value)


def test_a_cache_that_was_asked_for_has_to_leave_what_steps_take_and_no_more() -> None:
    check_cache("num_blocks=7", 400, 1000, Needs(500, 100))
    with pytest.raises(ConfigError, match=r"num_blocks=7 makes a cache of 401 bytes, but 1000 are free.* at most 400 bytes"):
        check_cache("num_blocks=7", 401, 1000, Needs(500, 100))


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float32, "dtype='bfloat16'"), (torch.bfloat16, "smaller model$")])
def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    dtype: torch.dtype, advice: str, path: Path, model: Model
) -> None:
    size = weights_size(path, dtype)
    assert size == model.num_parameters * dtype.itemsize
    check_weights(size, size, dtype)
    with pytest.raises(ConfigError, match=rf"take {size} bytes, but {size - 1} are free.*{advice}"):
        check_weights(size, size - 1, dtype)


def test_running_out_of_memory_says_what_was_done_and_what_to_change() -> None:
    def ran_out(error: BaseException) -> None:
        with running_out(InventedMemory(9000, 700), "loading", "buy more"):
            raise error

    for error in (torch.OutOfMemoryError("of torch"), RuntimeError("Triton Error [CUDA]: out of memory")):
        with pytest.raises(ConfigError, match=r"loading ran out of memory: 9000 bytes were free .*, 700 were taken .*; buy more"):
            ran_out(error)
    with pytest.raises(RuntimeError, match="something else"):
        ran_out(RuntimeError("something else"))


def test_running_out_while_weights_are_loaded_names_the_dtype(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> Model:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(build_module, "load_model", load)
    with pytest.raises(ConfigError, match=r"loading the weights ran out of memory: 1000000000 .*dtype='bfloat16'"):
        _load(EngineConfig(model=str(path)), path, torch.float32, CPU, False, InventedMemory(10**9))


def test_running_out_in_a_measured_step_names_the_sizes_of_steps(model: Model) -> None:
    class Greedy(ModelRunner):
        def submit(self, plan: Plan) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    config = EngineConfig(model="any", max_num_seqs=6, max_num_batched_tokens=64)
    device = Device(InventedMemory(10**9), lambda cache, length: Greedy(model, cache, 6, length), graphs=False)
    with pytest.raises(ConfigError, match=r"a step of 64 tokens and 6 sequences ran out .*_batched_tokens or max_num_seqs"):
        cache_blocks(config, model, 512, False, device)


def test_the_cache_is_sized_by_what_the_measured_steps_took(model: Model) -> None:
    size, free = block_bytes(model.config, 16, torch.float32, True), 1 << 30
    for taken in (0, 5000 * size):
        blocks, _ = sized(model, InventedMemory(free, taken, 0), length=1 << 30)
        assert blocks == (free - taken - MARGIN) // size
    assert sized(model, InventedMemory(free))[0] == 6 * 32 + 1, "more than all sequences could fill is not taken"


def test_settings_win_unless_steps_would_lack_memory(model: Model) -> None:
    size = block_bytes(model.config, 16, torch.float32, True)
    fits = {"num_blocks": 99}, {"kv_cache_memory": 100 * size}
    for settings in fits:
        assert sized(model, InventedMemory(1000 * size, 900 * size, 0), **settings)[0] == 100
        with pytest.raises(ConfigError, match=re.escape("{}={}".format(*next(iter(settings.items()))))):
            sized(model, InventedMemory(1000 * size, 900 * size + 1, 0), **settings)


def test_the_measured_steps_are_as_large_as_any_that_a_plan_can_have(model: Model) -> None:
    _, [largest, penalised, decoding] = sized(model, InventedMemory(1 << 30), length=40)
    lengths = largest.rows.offset[1:] - largest.rows.offset[:-1]
    assert lengths.tolist() == [40, 20, 1, 1, 1, 1] and len(largest.probes[0].at) == 6
    assert (largest.rows.start + lengths == 40).all()
    assert len(decoding.rows.slot) == 6 and (decoding.rows.tokens == LAST_TOKEN).all()
    assert penalised.specs[0].history


def test_an_engine_is_built_on_a_device_with_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a GPU's engine does before its first request: weights, measured steps, cache, steps to warm up."""
    settings: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 40, "max_model_len": 100}
    params = SamplingParams(max_tokens=8, temperature=0)
    [expected] = LLM("demo", **settings).generate("import ", params, use_tqdm=False)
    monkeypatch.setattr(build_module, "_memory", lambda _: InventedMemory(1 << 30))
    llm = LLM("demo", **settings)
    assert llm.engine.info()["num_blocks"] == 3 * 7
    [found] = llm.generate("import ", params, use_tqdm=False)
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    monkeypatch.setattr(build_module, "_memory", lambda _: InventedMemory(1 << 20))
    with pytest.raises(ConfigError, match=r"the weights take \d+ bytes, but 1048576 are free"):
        LLM("demo", **settings)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_products_are_not_rounded_to_tf32() -> None:
    _exact_products()
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cuda.matmul.allow_tf32  # raises where the two do not agree


def test_settings_of_torch_that_do_no_harm_are_left_alone() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    _exact_products()
    assert torch.backends.cuda.matmul.fp32_precision == before == "none"


def test_graphs_are_for_native_models_on_a_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, backed, cuda = load_outline(path), load_outline(path, "transformers"), torch.device("cuda", 0)
    assert [_graphs(asked, native, CPU) for asked in (None, False)] == [False, False]
    with pytest.raises(ConfigError, match=r"cuda_graphs=True is refused: graphs need a CUDA device, .* on the cpu"):
        _graphs(True, native, CPU)
    monkeypatch.setattr(build_module, "fused_on", lambda _: True)
    assert [_graphs(asked, native, cuda) for asked in (None, False, True)] == [True, False, True]
    assert [_graphs(asked, backed, cuda) for asked in (None, False)] == [False, False]
    with pytest.raises(ConfigError, match="LlamaForCausalLM runs through transformers"):
        _graphs(True, backed, cuda)
    monkeypatch.setattr(build_module, "fused_on", lambda _: False)
    assert _graphs(None, native, cuda) is False
    with pytest.raises(ConfigError, match="Triton"):
        _graphs(True, native, cuda)


@pytest.mark.parametrize(
    ("tokens", "sequences", "length", "spans"),
    [
        (8, 3, 100, [Span(94, 6), Span(99, 1), Span(99, 1)]),
        (8, 20, 100, [Span(99, 1)] * 8),
        (8, 3, 3, [Span(0, 3), Span(0, 3), Span(1, 2)]),
        (100, 2, 3, [Span(0, 3), Span(0, 3)]),
        (8, 1, 100, [Span(92, 8)]),
    ],
)
def test_the_largest_step_has_all_tokens_and_all_sequences(tokens: int, sequences: int, length: int, spans: list[Span]) -> None:
    assert DummySteps(5, 4, sequences, tokens, length).largest() == spans

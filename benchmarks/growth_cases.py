"""What benchmarks/growth.py measures: each function returns the points of one panel, on random weights in bfloat16.

A rate of decoding is the number of sequences over the median time of a step in which each of them grows by one token.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_models import made

from pagefork import BeamSearchParams, EngineConfig, LLMEngine, SamplingParams
from pagefork.scheduler.params import CommonParams

HERE = Path(__file__).parent
LONGEST = 4096 + 512
TRUNK: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TRUNK_NAME = "Llama shape, 134.5 M parameters, random weights in bfloat16"
PATIENCE = 120.0  # seconds that a process may take to print what it measured
WARM = 3  # steps before those that are timed
Point = dict[str, Any]


POWERS = tuple(1 << n for n in range(9))


class Sizes(NamedTuple):
    """How far the cases go."""

    batches: Sequence[int] = POWERS
    prompt: int = 128
    contexts: Sequence[int] = (128, 256, 512, 1024, 2048, 4096)
    together: int = 8  # sequences of each of these contexts
    widths: Sequence[int] = POWERS[:7]
    vocabularies: Sequence[int] = (4096, 8192, 16384, 32768, 65536, 151936)
    layers: int = 6  # of the models that differ in their vocabularies
    rows: int = 16  # sequences that they decode
    steps: int = 24
    scheduled: Sequence[int] = (1, 4, 16, 64, 256, 1024)
    requests: Sequence[int] = (4, 16, 64, 256, 1024)
    starts: int = 7
    repeats: int = 3


QUICK = Sizes((1, 4), 32, (64, 128), 2, (1, 4), (4096, 8192), 2, 4, 4, (1, 16), (4, 16), 1, 1)


def sampled() -> SamplingParams:
    return SamplingParams(top_p=0.95, max_tokens=256, ignore_eos=True, seed=0)


class Flow:
    """Requests of random tokens that run together, on an engine without a prefix cache."""

    def __init__(self, model: Path, **settings: Any) -> None:
        given: dict[str, Any] = {"max_model_len": LONGEST, "enable_prefix_caching": False, **settings}
        self._engine = LLMEngine(EngineConfig(model=str(model), **given))
        self._draw = random.Random(0)
        self._names: list[str] = []

    def start(self, count: int, length: int, params: CommonParams, sequences: int | None = None) -> float:
        """Adds so many prompts of so many tokens; seconds until all of them are computed, by a step more than that.

        sequences: that decode then; else one for each prompt.
        """
        self._names = [str(index) for index in range(count)]
        for name in self._names:
            self._engine.add_request(name, [self._draw.randrange(10, 4000) for _ in range(length)], params)
        begin = time.perf_counter()
        while True:
            end = time.perf_counter()
            if self._step() <= (sequences or count):
                return end - begin

    def step_seconds(self, sequences: int, steps: int) -> float:
        """The median time of a step. Raises RuntimeError unless all sequences grow by one token in each."""
        times = []
        for number in range(WARM + steps):
            begin = time.perf_counter()
            if (computed := self._step()) != sequences:
                raise RuntimeError(f"a step of {sequences} sequences computed {computed} tokens")
            if number >= WARM:
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def stop(self, left: int = 0) -> None:
        """Aborts all requests but the first few."""
        for name in self._names[left:]:
            self._engine.abort_request(name)
        self._names = self._names[:left]
        while not left and self._engine.has_unfinished_requests():
            self._engine.step()

    def _step(self) -> int:
        """One step: how many tokens it computed. Raises RuntimeError where a request failed."""
        before = self._engine.stats().forward_tokens
        for output in self._engine.step():
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id} failed: {output.error}")
        return self._engine.stats().forward_tokens - before


def batch(model: Path, sizes: Sizes) -> list[Point]:
    """Decoding so many sequences whose prompts have 128 tokens."""
    flow, points = Flow(model, max_num_seqs=max(sizes.batches)), []
    for count in sizes.batches:
        seconds = flow.start(count, sizes.prompt, sampled())
        step = flow.step_seconds(count, sizes.steps)
        points.append({"sequences": count, "tokens_per_s": count / step, "prompt_tokens_per_s": count * sizes.prompt / seconds})
        flow.stop()
    return points


def context(model: Path, sizes: Sizes) -> list[Point]:
    """Decoding one sequence and several, behind prompts of so many tokens."""
    flow, points = Flow(model), []
    for length in sizes.contexts:
        point: Point = {"context": length}
        flow.start(sizes.together, length, sampled())
        for count in (sizes.together, 1):
            flow.stop(left=count)
            point[f"tokens_per_s_of_{count}"] = count / flow.step_seconds(count, sizes.steps)
        flow.stop()
        points.append(point)
    return points


def prompt(model: Path, sizes: Sizes) -> list[Point]:
    """The time until a prompt of so many tokens is computed, alone."""
    flow, points = Flow(model), []
    for length in sizes.contexts:
        times = []
        for _ in range(sizes.repeats):
            times.append(flow.start(1, length, sampled()))
            flow.stop()
        points.append({"prompt": length, "seconds": statistics.median(times)})
    return points


def beam(model: Path, sizes: Sizes) -> list[Point]:
    """A step of one beam search of so many beams, behind a prompt of 128 tokens."""
    flow, points = Flow(model), []
    for width in sizes.widths:
        flow.start(1, sizes.prompt, BeamSearchParams(beam_width=width, max_tokens=256, ignore_eos=True), width)
        points.append({"width": width, "seconds": flow.step_seconds(width, sizes.steps)})
        flow.stop()
    return points


def vocabulary(model: Path, sizes: Sizes) -> list[Point]:
    """A step of 16 sequences, greedy and with top_p 0.95, of models of 6 layers that differ in their vocabulary."""
    points = []
    for size in sizes.vocabularies:
        point: Point = {"vocabulary": size}
        with made(TRUNK | {"vocab_size": size, "num_hidden_layers": sizes.layers}, torch.bfloat16) as directory:
            flow = Flow(directory, max_model_len=512)
        for kind, params in (("greedy", sampled().replace(temperature=0.0, top_p=1.0)), ("top_p", sampled())):
            flow.start(sizes.rows, sizes.prompt, params)
            point[f"seconds_{kind}"] = flow.step_seconds(sizes.rows, sizes.steps)
            flow.stop()
        points.append(point)
    return points


def scheduler(model: Path, sizes: Sizes) -> list[Point]:
    """A step of the scheduler alone, whose runner computes nothing: of requests of one sequence, and of searches of 4 beams."""
    from scheduler import running, step

    points = []
    for count in sizes.scheduled:
        point: Point = {"sequences": count}
        for kind, width in (("samples", 1), ("beams", 4)):
            if count < width:
                continue
            pair, times = running(count, width, search=width > 1), []
            for _ in range(100):
                begin = time.perf_counter()
                step(*pair)
                times.append(time.perf_counter() - begin)
            point[f"us_of_{kind}"] = 1e6 * statistics.median(times)
        points.append(point)
    return points


def memory(model: Path, sizes: Sizes) -> list[Point]:
    """Bytes per request of the demo model, waiting and running, as growth_memory.py measures them."""
    points = []
    for count in sizes.requests:
        traced, resident = (_printed([str(HERE / "growth_memory.py"), str(count), *flag]) for flag in (["--traced"], []))
        points.append({**traced, "running_resident": resident["running"]})
    return points


START = """
import json, sys, time
begin = time.time()
import torch
torch_there = time.time()
from pagefork import LLM, SamplingParams
LLM
imported = time.time()
llm = LLM(sys.argv[1])
loaded = time.time()
[output] = llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
assert len(output.outputs[0].token_ids) == 1
first = time.time()
print(json.dumps({"Python": begin - float(sys.argv[2]), "import torch": torch_there - begin,
    "import pagefork": imported - torch_there, "LLM(model)": loaded - imported, "first token": first - loaded}))
"""


def startup(model: Path, sizes: Sizes) -> list[Point]:
    """Seconds from the start of a process to its first token, by part; medians over processes after one that warms files."""
    points = []
    for name, given in (("demo model", "demo"), ("134.5 M", str(model))):
        runs = [_printed(["-c", START, given, str(time.time())]) for _ in range(sizes.starts + 1)][1:]
        points.append({"model": name, "parts": {part: statistics.median(run[part] for run in runs) for part in runs[0]}})
    return points


def _printed(arguments: list[str]) -> dict[str, Any]:
    """The JSON that a fresh interpreter prints. It keeps its byte code, as that of an installed package is kept."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


CASES: dict[str, Callable[[Path, Sizes], list[Point]]] = {
    case.__name__: case for case in (startup, scheduler, memory, batch, context, prompt, beam, vocabulary)
}

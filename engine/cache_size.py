"""How many blocks the cache has; on a GPU after measuring what the steps of the model take beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pagefork.scheduler.plan import Runner, Spec

from .cache import KVCache, block_bytes, num_blocks_for
from .config import EngineConfig
from .dummy_steps import DUMMY_BLOCKS, DummySteps, run
from .graph import graph_bytes
from .memory import Memory, Needs, cache_room, check_cache, running_out
from .models.registry import Model

_DRAWN = Spec(prompt_len=1, temperature=0.8, top_p=0.9, rank=True)
_PENALISED = Spec(prompt_len=1, temperature=0.8, top_p=0.9, repetition_penalty=1.1, no_repeat_ngram_size=3, rank=True)
_MIDDLING = 1000  # tokens; what longer histories and their token tables take comes out of the margin

MakesRunner = Callable[[KVCache, int], Runner]  # with a cache, for sequences of at most so many tokens


class Device(NamedTuple):
    """A GPU that a cache shares with the steps."""

    memory: Memory
    make_runner: MakesRunner  # without graphs
    graphs: bool  # whether decoding steps will be captured


def cache_blocks(config: EngineConfig, model: Model, length: int, hidden_states: bool, device: Device | None) -> int:
    """Blocks of the cache, the padding sink included; unasked no more than max_num_seqs sequences of `length` could fill.

    device: None on a CPU. Raises ConfigError where the cache does not fit.
    """
    size = block_bytes(model.config, config.block_size, model.dtype, hidden_states)
    if device is None:
        needs, free, room = None, 0, config.kv_cache_memory
    else:
        needs = _measured(config, model, length, hidden_states, size, device)
        free, room = device.memory.free(), config.kv_cache_memory
        if config.num_blocks is None and room is None:
            room = cache_room(free, device.memory.total, needs, least=2 * size)
    if config.num_blocks is not None:
        blocks, setting = config.num_blocks + 1, f"num_blocks={config.num_blocks}"
    else:
        blocks = num_blocks_for(room, model.config, config.block_size, model.dtype, hidden_states)
        setting = f"kv_cache_memory={config.kv_cache_memory}"
        if config.kv_cache_memory is None:
            return min(blocks, config.max_num_seqs * -(-length // config.block_size) + 1)
    if needs is not None:
        check_cache(setting, blocks * size, free, needs)
    return blocks


def _measured(config: EngineConfig, model: Model, length: int, hidden_states: bool, size: int, device: Device) -> Needs:
    """What steps of sequences take that the free memory could hold."""
    tokens = (config.num_blocks or (config.kv_cache_memory or device.memory.free()) // size) * config.block_size
    length = max(1, min(length, tokens))

    def make_runner() -> Runner:
        cache = KVCache(model.config, DUMMY_BLOCKS, config.block_size, model.dtype, model.device, hidden_states)
        cache.zero(DUMMY_BLOCKS)
        return device.make_runner(cache, length)

    steps = DummySteps(DUMMY_BLOCKS, config.block_size, config.max_num_seqs, config.max_num_batched_tokens, length)
    step, decoding = measure(device.memory, make_runner, steps)
    if not device.graphs:
        return Needs(step)
    return Needs(step, max(decoding, graph_bytes(model.config, model.dtype, config.max_num_seqs, length, tokens)))


def measure(memory: Memory, make_runner: Callable[[], Runner], steps: DummySteps) -> tuple[int, int]:
    """Bytes that the largest step takes, and one that decodes max_num_seqs sequences of middling length; all rows draw.

    In the largest step contexts are the longest, as those of forks of one long sequence are, however small the cache.
    make_runner: a runner with a cache of a few blocks; its tables and histories count as part of the largest step. Raises
    ConfigError if memory runs out.
    """
    advice = "lower max_num_batched_tokens or max_num_seqs"
    with running_out(memory, f"a step of {steps.max_tokens} tokens and {steps.max_num_seqs} sequences", advice):
        runner = make_runner()
        run(runner, steps.plan(steps.largest(), _DRAWN))
        run(runner, steps.plan(steps.decoding(_MIDDLING), _PENALISED))
        largest = memory.peak()
        memory.begin()
        run(runner, steps.plan(steps.decoding(_MIDDLING), _DRAWN))
        return largest, memory.peak()

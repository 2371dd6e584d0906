"""The same loads by transformers, on the same weights: `generate`, and its continuous batching."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from gpu_bench import ROUNDS, Bench
from gpu_cases import Row, mixed
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

logging.disable_progress_bar()

TIMES = 3  # a run of `generate` is repeated


def loaded(bench: Bench) -> Any:
    """The model, without end tokens; engines are gone before."""
    bench.drop()
    lm = AutoModelForCausalLM.from_pretrained(bench.directory, dtype=bench.dtype, attn_implementation="sdpa").eval()
    lm.generation_config.eos_token_id, lm.generation_config.pad_token_id = None, 0
    return lm.to(bench.device)


def _seconds(bench: Bench, lm: Any, prompts: list[list[int]], tokens: int, **settings: Any) -> float:
    """Of a run of `generate`, the median of a few. Raises RuntimeError if it ends early."""
    ids, times = torch.tensor(prompts, device=bench.device), []
    for _ in range(TIMES):
        bench.wait()
        begin = time.perf_counter()
        out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **settings)
        bench.wait()
        times.append(time.perf_counter() - begin)
        if out.shape[1] != ids.shape[1] + tokens:
            raise RuntimeError(f"generate gave {out.shape[1] - ids.shape[1]} tokens instead of {tokens}")
    return statistics.median(times)


def decode(bench: Bench, batch: int) -> Row:
    """Milliseconds of a step: what each further token adds to a run of one token."""
    sizes = bench.sizes
    batch, steps = min(batch, sizes.sequences), max(2, ROUNDS * sizes.steps // 4)
    run = partial(_seconds, bench, loaded(bench), bench.prompts(batch, sizes.prompt), do_sample=True, temperature=0.6, top_k=0)
    ms = 1000 * (run(1 + steps) - run(1)) / steps
    return {"unit": "ms", "value": ms, "limit": bench.read_ms(batch * (sizes.prompt + steps / 2))}


def beam(bench: Bench, searches: int, width: int) -> Row:
    """Tokens of the best outputs per second."""
    sizes = bench.sizes
    prompts = bench.prompts(searches, sizes.beam_prompt)
    seconds = _seconds(bench, loaded(bench), prompts, sizes.beam_tokens, num_beams=width, do_sample=False)
    return {"unit": "tokens/s", "value": searches * sizes.beam_tokens / seconds, "limit": None, "seconds": seconds}


def load(bench: Bench, count: int) -> Row:
    """Output tokens per second of requests of random lengths that come at once, by its continuous batching.

    Raises RuntimeError if a request fails or is lost.
    """
    lm = loaded(bench)
    prompts, wanted = mixed(bench, count)
    settings = GenerationConfig(do_sample=True, temperature=0.6, top_k=0, max_new_tokens=max(wanted), eos_token_id=-1)
    more: dict[str, Any] = {}
    if bench.device.type == "cpu":  # where it would take all memory
        from transformers import ContinuousBatchingConfig

        more["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    with lm.continuous_batching_context_manager(generation_config=settings, block=True, timeout=5, **more) as manager:
        _batched(manager, prompts[:4], [2] * min(4, count))
        begin = time.perf_counter()
        tokens = _batched(manager, prompts, wanted)
        seconds = time.perf_counter() - begin
    return {"unit": "tokens/s", "value": tokens / seconds, "limit": None, "requests": count, "tokens": tokens}


def _batched(manager: Any, prompts: list[list[int]], wanted: list[int]) -> int:
    """How many tokens came."""
    names = {manager.add_request(prompt, max_new_tokens=tokens) for prompt, tokens in zip(prompts, wanted, strict=True)}
    came = 0
    while names:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError(f"continuous batching ended with {len(names)} requests left")
        elif result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"a request failed: {result.error}")
            names.discard(result.request_id)
            came += len(result.generated_tokens)
    if came != sum(wanted):
        raise RuntimeError(f"continuous batching gave {came} tokens instead of {sum(wanted)}")
    return came

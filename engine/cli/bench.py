"""`pagefork bench throughput`: tokens per second on random prompts."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Annotated

import typer

from pagefork.cli.flags import Given
from pagefork.cli.generate import DEFAULT_ENGINE
from pagefork.config import EngineConfig
from pagefork.scheduler.params import SamplingParams


def throughput(
    *,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of every prompt")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of every output")] = 64,
    n: Annotated[int, typer.Option(min=1, help="Outputs per prompt")] = 1,
    output_json: Annotated[Path | None, typer.Option(help="Write the result to this file")] = None,
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Time a batch of random prompts, end tokens ignored; --seed makes the prompts too."""
    config = EngineConfig(**{**DEFAULT_ENGINE, **engine})
    from pagefork.llm import LLM

    llm = LLM(**{name: getattr(config, name) for name in config.__struct_fields__})
    draw = random.Random(config.seed)
    vocabulary = range(llm.engine.info()["vocab_size"])
    prompts = [draw.choices(vocabulary, k=input_len) for _ in range(num_prompts)]
    params = SamplingParams(n=n, temperature=1.0, ignore_eos=True, max_tokens=output_len)
    llm.generate([draw.choices(vocabulary, k=input_len)], params.replace(max_tokens=2), use_tqdm=False)  # warm up

    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    generated = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    total = generated + num_prompts * input_len
    rates = {
        "requests_per_second": num_prompts / seconds,
        "tokens_per_second": total / seconds,
        "output_tokens_per_second": generated / seconds,
    }
    print(f"{num_prompts} requests of {input_len} + {n} x {output_len} tokens in {seconds:.2f} s")
    print("{:.2f} requests/s, {:.1f} total tokens/s, {:.1f} output tokens/s".format(*rates.values()))
    if output_json is not None:
        load = {"model": config.model, "num_requests": num_prompts, "input_len": input_len, "output_len": output_len, "n": n}
        result = {**load, "elapsed_time": seconds, "total_num_tokens": total, **rates}
        output_json.write_text(json.dumps(result, indent=2) + "\n")

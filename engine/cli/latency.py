"""`pagefork bench latency`: how long one batch takes, again and again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from pagefork.cli.flags import Given
from pagefork.cli.generate import DEFAULT_ENGINE
from pagefork.cli.throughput import OUTPUT_JSON, Count
from pagefork.config import EngineConfig
from pagefork.scheduler.checking import Checked
from pagefork.scheduler.errors import ParameterError


class LatencyLoad(Checked, frozen=True, kw_only=True):
    """What `bench latency` runs."""

    batch_size: Annotated[Count, Meta(description="Requests that start together")] = 8
    input_len: Annotated[Count, Meta(description="Tokens of every prompt")] = 32
    output_len: Annotated[Count, Meta(description="Tokens of every output")] = 128
    n: Annotated[Count, Meta(description="Outputs per prompt")] = 1
    num_iters_warmup: Annotated[int, Meta(ge=0, description="Batches before the first that counts")] = 3
    num_iters: Annotated[Count, Meta(description="Batches that count")] = 10

    error: ClassVar = ParameterError
    foreign: ClassVar[dict[str, str]] = {}
    noun: ClassVar[str] = "parameter"

    def __post_init__(self) -> None:
        self.check_fields()


def latency(
    *,
    load: Annotated[Given, LatencyLoad],
    output_json: Annotated[Path | None, OUTPUT_JSON] = None,
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Time batches of one size, each with random prompts of its own (--seed), end tokens ignored.

    The latency is that of a whole batch; time to first token and inter-token latency are those of every output.
    """
    wanted = LatencyLoad(**load)
    config = EngineConfig(**{**DEFAULT_ENGINE, **engine})
    from pagefork import LLMEngine
    from pagefork.cli.load import check_writable, percentiles, random_work, run_batch, write_result

    check_writable(output_json)
    llm = LLMEngine(config)
    draw = random.Random(config.seed)
    sizes = (wanted.batch_size, wanted.input_len, wanted.output_len)
    timings = [
        run_batch(llm, random_work(llm, draw, *sizes), wanted.n) for _ in range(wanted.num_iters_warmup + wanted.num_iters)
    ][wanted.num_iters_warmup :]

    latencies = [timing.elapsed for timing in timings]
    measured = {
        "latency": latencies,
        "ttft": [value for timing in timings for value in timing.first],
        "itl": [value for timing in timings for value in timing.gaps],
    }
    found = {name: percentiles(values) for name, values in measured.items()}
    tokens = f"{wanted.input_len} + {wanted.n} x {wanted.output_len} tokens"
    print(f"{wanted.num_iters} batches of {wanted.batch_size} requests of {tokens}")
    for title, name in (("batch latency", "latency"), ("time to first token", "ttft"), ("inter-token latency", "itl")):
        values = "".join(f"  {key} {value * 1000:9.2f}" for key, value in found[name].items())
        print(f"{title:<20} ms{values or '  none: every output is one token'}")
    if output_json is not None:
        result: dict[str, Any] = {"avg_latency": found["latency"]["mean"], "latencies": latencies}
        result["percentiles"] = {"50": found["latency"]["median"], "90": found["latency"]["p90"], "99": found["latency"]["p99"]}
        for name in ("ttft", "itl"):
            result |= {f"{key}_{name}_ms": value * 1000 for key, value in found[name].items()}
        write_result(output_json, {**msgspec.structs.asdict(wanted), **result}, config)

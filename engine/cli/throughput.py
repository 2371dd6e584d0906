"""`pagefork bench throughput`: tokens per second of many requests at once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import typer
from msgspec import Meta

from pagefork.cli.flags import Given
from pagefork.cli.generate import DEFAULT_ENGINE
from pagefork.config import EngineConfig
from pagefork.scheduler.checking import Checked
from pagefork.scheduler.errors import ParameterError

Count = Annotated[int, Meta(ge=1)]
OUTPUT_JSON = typer.Option(metavar="FILE", help="Write the result to this file, with the machine and the versions")


class ThroughputLoad(Checked, frozen=True, kw_only=True):
    """What `bench throughput` runs."""

    dataset: Annotated[
        str,
        Meta(description='random, or a file with a JSON object in every line: "prompt", "prompt_token_ids" or "messages"'),
    ] = "random"
    num_prompts: Annotated[Count, Meta(description="Requests; None: 64 random ones, or every line of the file")] | None = None
    input_len: Annotated[Count, Meta(description="Tokens of every random prompt")] = 128
    output_len: Annotated[Count, Meta(description='Tokens of every output, where its line has no "max_tokens"')] = 64
    n: Annotated[Count, Meta(description="Outputs per prompt")] = 1

    error: ClassVar = ParameterError
    foreign: ClassVar[dict[str, str]] = {}
    noun: ClassVar[str] = "parameter"

    def __post_init__(self) -> None:
        self.check_fields()


def throughput(
    *,
    load: Annotated[Given, ThroughputLoad],
    output_json: Annotated[Path | None, OUTPUT_JSON] = None,
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Time a batch of prompts, end tokens ignored; --seed makes the random ones too."""
    wanted = ThroughputLoad(**load)
    config = EngineConfig(**{**DEFAULT_ENGINE, **engine})
    from pagefork import LLMEngine
    from pagefork.cli.load import check_writable, file_work, random_work, run_batch, write_result

    check_writable(output_json)
    llm = LLMEngine(config)
    draw = random.Random(config.seed)
    if wanted.dataset == "random":
        batch = random_work(llm, draw, wanted.num_prompts or 64, wanted.input_len, wanted.output_len)
    else:
        batch = file_work(llm, Path(wanted.dataset), wanted.num_prompts, wanted.output_len)
    run_batch(llm, random_work(llm, draw, 1, 16, 2), wanted.n)  # warm up

    timing = run_batch(llm, batch, wanted.n)
    read = sum(len(work.prompt) for work in batch)
    rates = {
        "requests_per_second": len(batch) / timing.elapsed,
        "tokens_per_second": (read + timing.generated) / timing.elapsed,
        "output_tokens_per_second": timing.generated / timing.elapsed,
    }
    print(f"{len(batch)} requests, {read} prompt tokens and {timing.generated} output tokens in {timing.elapsed:.2f} s")
    print("{:.2f} requests/s, {:.1f} total tokens/s, {:.1f} output tokens/s".format(*rates.values()))
    if output_json is not None:
        totals = {"elapsed_time": timing.elapsed, "num_requests": len(batch), "total_num_tokens": read + timing.generated}
        write_result(output_json, {**msgspec.structs.asdict(wanted), **totals, **rates}, config)

"""`pagefork bench serve`: a load on a running service, as `vllm bench serve` has it."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from pagefork.cli.flags import Given
from pagefork.cli.serving_flags import ServeLoad
from pagefork.cli.strategy import STRATEGIES, Strategy, fields_of_others
from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import CommonParams

if TYPE_CHECKING:
    from numpy.random import Generator

    from pagefork.cli.serving_load import Ask, Run, Target
    from pagefork.cli.serving_targets import ParamsOf

_HTTP_VOCABULARY = 1000  # random ids that every vocabulary has: an HTTP server does not tell the size of its own
ValueFn = Annotated[
    str | None, typer.Option(metavar="NAME", help="What a leaf of mcts is worth, by a name that the service knows")
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw how the first tokens and the gaps are distributed")]


def serve_load(
    *,
    load: Annotated[Given, ServeLoad],
    plot: Plot = None,
    strategy: Annotated[Strategy, typer.Option(help="How tokens are chosen; others than sample with --backend zmq")] = "sample",
    value_fn: ValueFn = None,
    sampling: Annotated[Given, STRATEGIES, fields_of_others, {"max_tokens"}],
) -> None:
    """Load a running service and time its answers, as their reader sees them.

    ttft: from sending to the first token, over HTTP to the first text. itl: between tokens; those that come together are
    one arrival, so a mean itl may be above tpot. tpot: (e2el - ttft) / (output tokens - 1), where an output came in several
    parts. e2el: from sending to the end. A request that fails counts as failed and in no other number. Random prompts
    ignore end tokens, unless --no-ignore-eos is given. An interrupted run reports what had ended.
    """
    wanted = ServeLoad(**load)
    if wanted.dataset_name == "random":
        sampling = {"ignore_eos": True, **sampling}
    if value_fn is not None:
        sampling = {**sampling, "value_fn": value_fn}
    if strategy != "sample" and wanted.backend != "zmq":
        raise InvalidRequestError(f"strategy={strategy} is for --backend zmq; over HTTP, --extra-body can ask for a search")
    from pagefork.cli.load import check_writable
    from pagefork.cli.serving_report import check_plot, draw_plot, lines, summary

    check_writable(plot, "plot")
    if plot is not None:
        check_plot(plot)
    if wanted.save_result:
        folder = Path(wanted.result_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / (wanted.result_filename or "result.json"), "result_filename")
    model, run = asyncio.run(_measure(wanted, strategy, sampling))

    metrics, points = wanted.metrics(), wanted.percentiles()
    found = summary(run, metrics, points, wanted.goals())
    print("\n".join(lines(run, found, metrics, points)))
    if wanted.save_result:
        print(f"written to {_save(wanted, model, run, found, {'strategy': strategy, **sampling})}")
    if plot is not None:
        draw_plot(run, plot, f"{model}: {found['completed']} requests, {found['output_throughput']:.0f} output tokens/s")
    if run.interrupted:
        raise KeyboardInterrupt
    if not found["completed"]:
        raise InvalidRequestError("no request was answered")


async def _measure(load: ServeLoad, strategy: Strategy, given: Given) -> tuple[str, Run]:
    """The model that was served, and what came of the load."""
    import numpy as np

    from pagefork.cli.serving_load import arrivals, drive
    from pagefork.progress import Bar

    struct: Any = STRATEGIES[strategy]

    @cache
    def params_of(length: int) -> CommonParams:
        params: CommonParams = struct(**given, max_tokens=length)
        return params

    params_of(2**20)  # what can't be sent is refused before a service is looked for
    lines = _lines(load)
    async with _target(load, given, params_of) as target:
        draw = np.random.default_rng(load.seed)
        asks = lines or _random(load, draw, target, load.num_prompts or 64)
        warmups = list(islice(cycle(lines), load.num_warmups)) or _random(load, draw, target, load.num_warmups)
        warm = await drive(target, warmups, [0.0] * len(warmups), load.max_concurrency, lambda: None)
        if warm.interrupted:
            raise KeyboardInterrupt
        times = arrivals(draw, len(asks), load.request_rate, load.burstiness)
        with Bar(total=len(asks), desc="requests", unit="request", disable=load.disable_tqdm, dynamic_ncols=True) as bar:
            return target.model, await drive(target, asks, times, load.max_concurrency, bar.update)


def _target(load: ServeLoad, given: Given, params_of: ParamsOf) -> AbstractAsyncContextManager[Target]:
    from pagefork.cli.serving_targets import engine_target, http_target

    patience = load.ready_check_timeout_sec
    if load.backend == "zmq":
        return engine_target(load.address, (load.server_key, load.client_key), load.model, patience, params_of)
    host = f"[{load.host}]" if ":" in load.host else load.host
    url = load.base_url or f"http://{host}:{load.port}"
    return http_target(url.rstrip("/"), load.endpoint, load.model, patience, {**given, **load.further()})


def _lines(load: ServeLoad) -> list[Ask]:
    """The prompts of the file, where there is one."""
    from pagefork.cli.serving_load import file_asks

    return file_asks(Path(load.dataset_path), load.num_prompts, load.custom_output_len) if load.dataset_path else []


def _random(load: ServeLoad, draw: Generator, target: Target, count: int) -> list[Ask]:
    """Random prompts. Raises InvalidRequestError when the model does not take ones so long."""
    from pagefork.cli.load import check_room
    from pagefork.cli.serving_load import random_asks

    lengths = (load.random_input_len, load.random_output_len)
    if target.max_model_len is not None:
        longest = [int(length * (1 + load.random_range_ratio)) for length in lengths]
        check_room("a request", load.random_prefix_len + longest[0], longest[1], target.max_model_len)
    vocabulary = target.vocab_size or _HTTP_VOCABULARY
    return random_asks(draw, count, vocabulary, lengths, load.random_prefix_len, load.random_range_ratio)


def _save(load: ServeLoad, model: str, run: Run, found: dict[str, Any], sampling: Given) -> Path:
    """Write the result, its settings and the machine of this client; the file."""
    from pagefork.cli.machine import host_facts
    from pagefork.cli.serving_report import details

    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    rate = "inf" if load.request_rate is None else load.request_rate
    limit = "" if load.max_concurrency is None else f"-concurrency{load.max_concurrency}"
    name = load.result_filename or f"{load.backend}-{rate}qps{limit}-{Path(model).name}-{now}.json"
    settings = {**msgspec.structs.asdict(load), "request_rate": rate, "num_prompts": len(run.answers)}
    shown = {key: value for key, value in settings.items() if key not in ("model", "result_dir", "result_filename")}
    result = {"date": now, "model_id": model, **shown, "metadata": load.notes(), "sampling": sampling, **found}
    if load.save_detailed:
        result |= details(run)
    file = Path(load.result_dir or ".") / name
    file.write_text(json.dumps({**result, "machine": host_facts()}, indent=2) + "\n")
    return file

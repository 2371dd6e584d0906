"""What does it cost to have the engine in another process, behind a socket?

Streams through a served engine (ZeroMQ, AsyncClient) beside the same requests through an LLMEngine stepped in this process:
the same model, prompts, lengths, dtype. Whatever serves is pinned to one core and computes in one thread; whatever reads
from a service is pinned to another core. The two take turns, A B A B. Measured are

- output tokens per second of 64 requests at once, and how long their first tokens took, which is mostly a queue for prefill;
- the time to first token of single requests, while 16 others run, and with an engine that is idle;
- the processor time that both sides of the service take, and the start of a process that has a client.

    python benchmarks/service.py [--prompts 64 --input-len 128 --output-len 64 --pairs 3]
    python benchmarks/service.py --quick     # the demo model and a short load: whether it works

Without --model it makes a Llama of 134.5 M parameters with random weights in .cache/. Writes a JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pagefork import AsyncClient, EngineConfig, LLMEngine, SamplingParams
from pagefork.server.config import ServiceConfig
from pagefork.server.launch import Served

sys.path.insert(0, str(Path(__file__).parent))
from paired import add_load, parsed
from shared import RANDOM_LLAMA, ROOT, facts, random_llama

Prompts = list[list[int]]
STARTS = {"python": "pass", "client": "from pagefork import Client", "async_client": "from pagefork import AsyncClient"}
OTHERS_LEN = 800  # tokens; they are aborted when the single requests have their answers
TOO_SHORT = "the requests that were to run meanwhile have ended: lower --probes or --busy-gap"
GOALS = {"throughput_loss_percent": 10.0, "ttft_difference_ms": 5.0}


class Batch(NamedTuple):
    """Seconds of all, and to the first token of each; processor seconds of what serves and of what reads."""

    seconds: float
    tokens: int
    first: list[float]
    engine_cpu: float
    client_cpu: float
    deltas: int


def params(length: int) -> SamplingParams:
    return SamplingParams(top_p=0.95, max_tokens=length, ignore_eos=True)


class InProcess:
    """Requests to an LLMEngine that this thread steps."""

    def __init__(self, config: EngineConfig, core: int) -> None:
        self._core = core
        self._engine = LLMEngine(config)
        self._number = 0

    def batch(self, prompts: Prompts, length: int) -> Batch:
        """All at once."""
        os.sched_setaffinity(0, {self._core})
        cpu, start = time.process_time(), time.perf_counter()
        ids = [self._add(prompt, length) for prompt in prompts]
        first, tokens = self._finish(dict.fromkeys(ids, start))
        seconds = time.perf_counter() - start
        return Batch(seconds, tokens, list(first.values()), time.process_time() - cpu, 0.0, 0)

    def probe(self, others: Prompts, length: int, probes: Prompts, times: Sequence[float]) -> list[float]:
        """Seconds to the first token of requests that come at these times, while others run.

        One that comes in the middle of a step waits for its end, as it does behind a socket.
        """
        os.sched_setaffinity(0, {self._core})
        running = {self._add(prompt, length) for prompt in others}
        waiting = set(running)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        start = time.perf_counter()
        due = [(start + at, prompt) for at, prompt in zip(times, probes, strict=True)]
        sent: dict[str, float] = {}
        first: dict[str, float] = {}
        while len(first) < len(probes):
            if due and not self._engine.has_unfinished_requests():  # as a service waits: asleep, its caches growing cold
                time.sleep(max(0.0, due[0][0] - time.perf_counter()))
            while due and due[0][0] <= time.perf_counter():
                at, prompt = due.pop(0)
                sent[self._add(prompt, 1)] = at
            for output in self._engine.step():
                if output.request_id in sent:
                    first.setdefault(output.request_id, time.perf_counter() - sent[output.request_id])
                elif output.finished:
                    raise RuntimeError(TOO_SHORT)
        for request_id in running:
            self._engine.abort_request(request_id)
        self._engine.step()
        return list(first.values())

    def _add(self, prompt: list[int], length: int) -> str:
        self._number += 1
        self._engine.add_request(str(self._number), prompt, params(length))
        return str(self._number)

    def _finish(self, sent: dict[str, float]) -> tuple[dict[str, float], int]:
        first: dict[str, float] = {}
        tokens = 0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, time.perf_counter() - sent[output.request_id])
                tokens += len(output.outputs[0].token_ids) if output.finished else 0
        return first, tokens


class Service:
    """Requests to a served engine, from one event loop."""

    def __init__(self, served: Served, client: AsyncClient) -> None:
        self._served, self._client = served, client

    async def batch(self, prompts: Prompts, length: int) -> Batch:
        """All at once."""
        engine, cpu, start = cpu_seconds(self._served.pid), time.process_time(), time.perf_counter()
        done = await asyncio.gather(*(self._read(prompt, length) for prompt in prompts))
        seconds = time.perf_counter() - start
        return Batch(
            seconds,
            sum(tokens for _, tokens, _ in done),
            [first for first, _, _ in done],
            cpu_seconds(self._served.pid) - engine,
            time.process_time() - cpu,
            sum(deltas for _, _, deltas in done),
        )

    async def probe(self, others: Prompts, length: int, probes: Prompts, times: Sequence[float]) -> list[float]:
        """As InProcess.probe."""
        streams = [self._client.stream(prompt, params(length)) for prompt in others]
        for stream in streams:
            await anext(stream)
        readers = [asyncio.create_task(stream.result()) for stream in streams]
        start = time.perf_counter()

        async def one(at: float, prompt: list[int]) -> float:
            await asyncio.sleep(start + at - time.perf_counter())
            first, _, _ = await self._read(prompt, 1)
            return first

        found = await asyncio.gather(*(one(at, prompt) for at, prompt in zip(times, probes, strict=True)))
        if any(reader.done() for reader in readers):
            raise RuntimeError(TOO_SHORT)
        for stream in streams:
            stream.abort()
        await asyncio.gather(*readers)
        return found

    async def _read(self, prompt: list[int], length: int) -> tuple[float, int, int]:
        """Seconds to the first token, tokens and deltas."""
        first, tokens, deltas = 0.0, 0, 0
        start = time.perf_counter()
        async for delta in self._client.stream(prompt, params(length)):
            if delta.tokens:
                first = first or time.perf_counter() - start
            tokens += len(delta.tokens)
            deltas += 1
        return first, tokens, deltas


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of another process."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def pin(pid: int, core: int) -> None:
    """Keep every thread of a process on one core; those to come inherit it."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def start_milliseconds(code: str, times: int = 7) -> float:
    """The median time of a Python process that runs this."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-P", "-c", code], check=True)
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def loads(args: argparse.Namespace, draw: random.Random, count: int, length: int) -> dict[str, tuple[Any, ...]]:
    """By the name of a measurement, what batch() or probe() takes: prompts that no one has seen, and times."""

    def prompts(count: int, length: int) -> Prompts:
        return [draw.choices(range(10, 4000), k=length) for _ in range(count)]

    def probes(gap: float, jitter: float) -> tuple[Prompts, list[float]]:
        return prompts(count, args.probe_len), [gap * (at + jitter * draw.random()) for at in range(count)]

    return {
        "batch": (prompts(args.prompts, args.input_len), length),
        "idle": ([], 1, *probes(args.idle_gap, 0.1)),
        "busy": (prompts(args.others, args.input_len), OTHERS_LEN, *probes(args.busy_gap, 1.0)),
    }


def measure(args: argparse.Namespace, config: EngineConfig, cores: tuple[int, int]) -> dict[str, list[Any]]:
    """What both sides came to in each round, by the name of the measurement and the side."""
    draw = random.Random(args.seed)
    found: dict[str, list[Any]] = {}
    engine_core, client_core = cores
    alone = InProcess(config, engine_core)
    gc.collect()
    gc.freeze()  # as the service does once its model is loaded
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        environment = {**os.environ, "PAGEFORK_RUNTIME_DIR": folder}
        with Served(ServiceConfig(engine=config, log_level="warning"), environment=environment) as served:
            pin(served.pid, engine_core)
            pin(os.getpid(), client_core)
            client = runner.run(connected(served.endpoint))
            service = Service(served, client)
            for pair in range(-1, args.pairs):  # -1 is the warm-up
                count, length = (args.probes, args.output_len) if pair >= 0 else (2, 4)
                for name, load in loads(args, draw, count, length).items():
                    batch = name == "batch"
                    ours = alone.batch(*load) if batch else alone.probe(*load)
                    os.sched_setaffinity(0, {client_core})
                    theirs = runner.run(service.batch(*load) if batch else service.probe(*load))
                    if pair >= 0:
                        found.setdefault(f"{name} in process", []).append(ours)
                        found.setdefault(f"{name} service", []).append(theirs)
                        show(pair, name, ours, theirs)
            runner.run(client.close())
    gc.unfreeze()
    return found


async def connected(endpoint: str) -> AsyncClient:
    client = AsyncClient(endpoint, name="benchmark", connect_timeout=60.0)
    await client.connect()
    return client


def show(pair: int, name: str, ours: Any, theirs: Any) -> None:
    if isinstance(ours, Batch):
        shown = [f"{batch.tokens / batch.seconds:8.1f} output tokens/s" for batch in (ours, theirs)]
    else:
        shown = [f"{1000 * statistics.median(times):8.1f} ms to the first token" for times in (ours, theirs)]
    print(f"pair {pair}  {name:<6} in process {shown[0]}, service {shown[1]}", flush=True)


def summarise(found: dict[str, list[Any]]) -> dict[str, Any]:
    """Ratios and differences, over the pairs."""
    ours, theirs = found["batch in process"], found["batch service"]
    ratios = [(b.tokens / b.seconds) / (a.tokens / a.seconds) for a, b in zip(ours, theirs, strict=True)]
    deltas = sum(batch.deltas for batch in theirs)
    result: dict[str, Any] = {
        "output_tokens_per_second": {
            "in_process": statistics.median(batch.tokens / batch.seconds for batch in ours),
            "service": statistics.median(batch.tokens / batch.seconds for batch in theirs),
            "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        },
        "ttft_ms": {"at_once": compared([batch.first for batch in ours], [batch.first for batch in theirs])},
        "engine_cpu_seconds": {
            "in_process": statistics.median(batch.engine_cpu for batch in ours),
            "service": statistics.median(batch.engine_cpu for batch in theirs),
        },
        "client": {
            "deltas_per_second": deltas / sum(batch.seconds for batch in theirs),
            "cpu_ms_per_delta": 1000 * sum(batch.client_cpu for batch in theirs) / deltas,
        },
        "goals": GOALS,
    }
    for name in ("idle", "busy"):
        result["ttft_ms"][name] = compared(found[f"{name} in process"], found[f"{name} service"])
    return result


def compared(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, Any]:
    """Medians over everything in milliseconds, and the differences of the medians of each pair."""
    differences = [1000 * (statistics.median(b) - statistics.median(a)) for a, b in zip(ours, theirs, strict=True)]
    return {
        "in_process": 1000 * statistics.median(chain(*ours)),
        "service": 1000 * statistics.median(chain(*theirs)),
        "difference": statistics.median(differences),
        "differences": differences,
    }


def flooded(core: int, engine_core: int, streams: int, deltas: int) -> dict[str, Any]:
    """How fast a client takes what a stand-in for an engine sends, on a core of its own."""
    pin(os.getpid(), core)
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/flood"
        script = [sys.executable, "-P", str(Path(__file__).with_name("flood.py")), endpoint, str(streams), str(deltas)]
        with subprocess.Popen(script, stdout=subprocess.PIPE) as flood:
            assert flood.stdout is not None
            flood.stdout.readline()
            pin(flood.pid, engine_core)
            seconds, cpu = asyncio.run(drink(endpoint, streams))
    rate = streams * deltas / seconds
    return {
        "streams": streams,
        "messages_per_second": deltas / seconds,
        "deltas_per_second": rate,
        "cpu_us_per_delta": 1e6 * cpu / (streams * deltas),
    }


async def drink(endpoint: str, streams: int) -> tuple[float, float]:
    """Seconds, and processor seconds, to read so many streams to their ends."""
    async with AsyncClient(endpoint, window=2**20 - 1) as client:

        async def read() -> None:
            async for _ in client.stream([1], params(1)):
                pass

        start, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(read() for _ in range(streams)))
        return time.perf_counter() - start, time.process_time() - cpu


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_load(parser, prompts=64, input_len=128, output_len=64)
    parser.add_argument("--probes", type=int, default=20, help="single requests in each round, idle and busy")
    parser.add_argument("--probe-len", type=int, default=32, help="tokens of their prompts")
    parser.add_argument("--others", type=int, default=16, help="requests that run while they come")
    parser.add_argument("--idle-gap", type=float, default=0.4, help="seconds between them, with an idle engine")
    parser.add_argument("--busy-gap", type=float, default=0.7, help="the same, while others run")
    parser.add_argument("--flood", type=int, default=5000, help="deltas of each stream that the client's speed is measured with")
    parser.add_argument("--quick", action="store_true", help="the demo model and a short load; numbers of no worth")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for service.json")
    args = parsed(parser)
    if args.quick:
        args.model, args.prompts, args.output_len, args.pairs = args.model or "demo", 16, 32, 1
        args.probes, args.others, args.idle_gap, args.busy_gap, args.flood = 5, 4, 0.05, 0.05, 200
    if min(args.probes, args.probe_len, args.others, args.flood) < 1 or min(args.idle_gap, args.busy_gap) <= 0:
        parser.error("--probes, --probe-len, --others and --flood must be at least 1, and the gaps above 0")
    return args


def main() -> None:
    args = arguments()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the engine, one for its clients")
    engine_core, client_core = cores[0], cores[1]
    about = facts() | {"threads": 1}
    startup = {name: start_milliseconds(code) for name, code in STARTS.items()}
    tokens = args.prompts * (args.input_len + args.output_len) + args.others * (args.input_len + OTHERS_LEN)
    config = EngineConfig(
        model=args.model or random_llama(),
        dtype=args.dtype,
        num_threads=1,
        num_blocks=tokens // 8,  # twice what they need at most
        seed=args.seed,
    )
    found = measure(args, config, (engine_core, client_core))
    summary = summarise(found)
    summary["client"]["start_ms"] = startup
    summary["client"]["flood"] = [flooded(client_core, engine_core, streams, args.flood) for streams in (1, 64)]
    load = (
        "prompts",
        "input_len",
        "output_len",
        "dtype",
        "pairs",
        "probes",
        "probe_len",
        "others",
        "idle_gap",
        "busy_gap",
        "seed",
    )
    result = {
        **about,
        "model": args.model or RANDOM_LLAMA,
        "load": {name: getattr(args, name) for name in load},
        "summary": summary,
        "rounds": {
            name: [batch._asdict() if isinstance(batch, Batch) else batch for batch in rounds] for name, rounds in found.items()
        },
    }
    print(json.dumps(summary, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "service.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How a kernel is timed on a CUDA device, and how its times are told.

A case is timed as the replay of a CUDA graph that holds several calls, each on buffers of its own; before every replay
the second-level cache is overwritten, so that what a call reads comes from memory. The median over the replays counts,
divided by the calls. What cannot be captured is called from Python instead, and marked as `eager`.
The floor is the time that the device takes to move the bytes that the operation has to read and write, at the rate of
a copy that is measured first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from chart import draw_chart
from shared import ROOT, facts

NO_DEVICE = 3  # exit status
MOST_CALLS = 16  # in a graph
Call: TypeAlias = Callable[[], object]
Shape: TypeAlias = Mapping[str, int | str]


class Work(NamedTuple):
    """What one case does."""

    calls: Sequence[Call]  # the operation, each time on other buffers: as many as `Device.copies` says
    bytes: int  # that one call has to read and write, each byte once
    peers: Mapping[str, Sequence[Call]] = {}  # the same by others, by name


class Device:
    """The CUDA device, and its clock."""

    def __init__(self) -> None:
        self.name = torch.device("cuda")
        cache = torch.cuda.get_device_properties(self.name).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device=self.name)
        source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=self.name) for _ in range(2))
        self.bytes_per_us = 2 * source.numel() / self.time([lambda: target.copy_(source)])[0]
        self._cache = cache

    def copies(self, size: int) -> int:
        """How many buffers of `size` bytes go into one graph: more than the cache holds, as far as that makes sense."""
        return max(1, min(MOST_CALLS, -(-2 * self._cache // max(size, 1))))

    def time(self, calls: Sequence[Call]) -> tuple[float, str]:
        """Microseconds per call, and "graph" or "eager"."""
        for call in calls:  # compiles
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError:  # it waits for the device
            torch.cuda.synchronize()
            return self._median(lambda: [call() for call in calls]) / len(calls), "eager"
        return self._median(graph.replay) / len(calls), "graph"

    def _median(self, run: Call) -> float:
        """Microseconds, over at least 5 runs and at most 30 or 100 ms of them."""
        times: list[float] = []
        while len(times) < 5 or (len(times) < 30 and sum(times) < 1e5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end))
        return statistics.median(times)


def main(op: str, doc: str, shapes: Sequence[Shape], prepare: Callable[[Shape, Device], Work]) -> None:
    """Times the cases in order until --seconds are over, prints a table, and writes kernel_<op>.json and a chart.

    Exits with NO_DEVICE where there is none, with 1 after a case that failed.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="no case begins later")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder for the JSON and the chart")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{op}: needs a CUDA device", file=sys.stderr)
        sys.exit(NO_DEVICE)
    start, device = time.monotonic(), Device()
    result: dict[str, Any] = {**facts(), "op": op, "copy_gb_per_s": device.bytes_per_us / 1000, "cases": [], "failed": []}
    print(f"{op} on {result['gpu']}: a copy moves {result['copy_gb_per_s']:.0f} GB/s", flush=True)
    for shape in shapes:
        if time.monotonic() - start > args.seconds:
            break
        try:
            result["cases"].append(case := measured(shape, prepare, device))
            print(line(case), flush=True)
        except (RuntimeError, ValueError) as error:
            result["failed"].append({"shape": dict(shape), "error": str(error)[:500]})
            print(f"{label(shape)}: failed: {str(error)[:500]}", flush=True)
        torch.cuda.empty_cache()
    result["left_out"] = len(shapes) - len(result["cases"]) - len(result["failed"])
    if result["left_out"]:
        print(f"{result['left_out']} of {len(shapes)} cases were left out: {args.seconds:.0f} s were over")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"kernel_{op}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_chart([result], args.output / f"kernel_{op}.png")
    sys.exit(bool(result["failed"]))


def measured(shape: Shape, prepare: Callable[[Shape, Device], Work], device: Device) -> dict[str, Any]:
    """One case: the shape, microseconds, floor and peers."""
    work = prepare(shape, device)
    us, how = device.time(work.calls)
    floor = work.bytes / device.bytes_per_us
    peers = {}
    for name, calls in work.peers.items():
        peer_us, peer_how = device.time(calls)
        peers[name] = {"us": peer_us, "timed": peer_how}
    return {"shape": dict(shape), "us": us, "timed": how, "bytes": work.bytes, "floor_us": floor, "peers": peers}


def label(shape: Shape) -> str:
    return " ".join(value if isinstance(value, str) else f"{name}={value}" for name, value in shape.items())


def line(case: dict[str, Any]) -> str:
    """One row of the printed table."""
    eager = "" if case["timed"] == "graph" else " eager"
    peers = "".join(
        f"  {name} {peer['us']:.1f}{'' if peer['timed'] == 'graph' else ' eager'} ({peer['us'] / case['us']:.1f}x)"
        for name, peer in case["peers"].items()
    )
    times = case["us"] / case["floor_us"]
    return f"{label(case['shape']):<44} {case['us']:9.1f} us{eager}  {times:7.1f} x floor ({case['floor_us']:.2f}){peers}"

"""What does a request take of the host's memory, waiting and running? A fresh process for each number of them.

    python benchmarks/growth_memory.py COUNT [--traced]

Requests of 128 tokens to the demo model wait, then run until each has generated 8 more. Measured is how much the memory of
the idle engine, which has served a request before, has grown: what the process holds of the machine's (of which keys and
values are a part), or with --traced what Python and numpy have allocated. Prints bytes per request as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from pagefork import EngineConfig, LLMEngine, SamplingParams

PROMPT, GENERATED = 128, 8
BLOCK = 16


def resident() -> int:
    """Bytes of the machine's memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def traced() -> int:
    return tracemalloc.get_traced_memory()[0]


def per_request(count: int, read: Callable[[], int]) -> dict[str, float]:
    """Bytes per request, of so many that wait or run; cache: of keys and values when they run."""
    room = PROMPT + 64
    blocks = count * -(-room // BLOCK) + 64
    engine = LLMEngine(EngineConfig(model="demo", max_num_seqs=count, max_model_len=room, num_blocks=blocks, block_size=BLOCK))
    draw, params = random.Random(0), SamplingParams(top_p=0.95, max_tokens=32, ignore_eos=True, seed=0)

    def prompt() -> list[int]:
        return [draw.randrange(10, 2000) for _ in range(PROMPT)]

    engine.add_request("first", prompt(), params)
    while engine.has_unfinished_requests():
        engine.step()
    gc.collect()
    idle = read()
    for index in range(count):
        engine.add_request(str(index), prompt(), params)
    gc.collect()
    waiting = read()
    begun = engine.stats().steps
    while engine.stats().num_waiting or engine.stats().steps == begun:
        engine.step()
    for _ in range(GENERATED):
        engine.step()
    gc.collect()
    running, info = read(), engine.info()
    return {
        "requests": count,
        "waiting": (waiting - idle) / count,
        "running": (running - idle) / count,
        "cache": info["cache_memory"] / (info["num_blocks"] + 1) / BLOCK * (PROMPT + GENERATED),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--traced", action="store_true", help="what Python allocates instead of what the process holds")
    args = parser.parse_args()
    if args.traced:
        tracemalloc.start()
    print(json.dumps(per_request(args.count, traced if args.traced else resident)))


if __name__ == "__main__":
    main()

"""What the benchmarks run: random prompts or those of a file, through the engine, with the time of every token."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from pagefork.cli.machine import machine_facts
from pagefork.config import EngineConfig
from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import SamplingParams

if TYPE_CHECKING:
    from pagefork.core import LLMEngine

T = TypeVar("T")


class Work(NamedTuple):
    """One request: its tokens, and how many are generated, whatever the model's end tokens say."""

    prompt: list[int]
    output_len: int


class Timing(NamedTuple):
    """Seconds: of the whole batch, from its start to the first token of every output, and from each token to the next."""

    elapsed: float
    first: list[float]
    gaps: list[float]
    generated: int


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a file of prompts."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    output_len: int | None = None

    def length(self, default: int) -> int:
        """Tokens to generate. Raises InvalidRequestError, also when there is not exactly one prompt."""
        prompts = {"prompt": self.prompt, "prompt_token_ids": self.prompt_token_ids, "messages": self.messages}
        given = [name for name, value in prompts.items() if value is not None]
        lengths = [length for length in (self.max_tokens, self.output_len) if length is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise InvalidRequestError(f"a line has one of {', '.join(prompts)}; this one has {found}")
        if len(lengths) > 1 or (lengths and lengths[0] < 1):
            raise InvalidRequestError("max_tokens, or output_len, is one number >= 1")
        return lengths[0] if lengths else default


def random_work(engine: LLMEngine, draw: random.Random, count: int, input_len: int, output_len: int) -> list[Work]:
    """Prompts of random tokens: no two begin alike, so nothing comes from the prefix cache."""
    vocabulary = range(engine.info()["vocab_size"])
    check_room("a request", input_len, output_len, engine.max_model_len)
    return [Work(draw.choices(vocabulary, k=input_len), output_len) for _ in range(count)]


def file_work(engine: LLMEngine, file: Path, count: int | None, output_len: int) -> list[Work]:
    """The first `count` lines of a file, None: all. Raises InvalidRequestError with the number of the line that is wrong."""

    def work(line: Line) -> Work:
        length = line.length(output_len)
        found = Work(_tokens(engine, line), length)
        check_room("the line", len(found.prompt), found.output_len, engine.max_model_len)
        engine.prepare("line", found.prompt, SamplingParams())
        return found

    return read_lines(file, count, work)


def read_lines(file: Path, count: int | None, convert: Callable[[Line], T]) -> list[T]:
    """What `convert` makes of the first `count` lines of a file, None: all, but for those that are blank.

    Raises InvalidRequestError with the number of the line that is wrong, and when the lines are too few.
    """
    found: list[T] = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip() or len(found) == count:
            continue
        try:
            found.append(convert(msgspec.json.decode(line, type=Line)))
        except (msgspec.MsgspecError, UnicodeDecodeError, InvalidRequestError) as error:
            raise InvalidRequestError(f"{file}:{number}: {error}") from None
    if len(found) < (count or 1):
        raise InvalidRequestError(f"{file} has {len(found)} prompts, fewer than num_prompts={count or 1}")
    return found


def _tokens(engine: LLMEngine, line: Line) -> list[int]:
    if line.prompt_token_ids is not None:
        return line.prompt_token_ids
    if engine.tokenizer is None:
        raise InvalidRequestError("the checkpoint has no tokenizer: give prompt_token_ids")
    if line.prompt is not None:
        return engine.tokenizer.encode(line.prompt)
    return engine.tokenizer.render_chat(line.messages or [])


def check_room(what: str, input_len: int, output_len: int, max_model_len: int) -> None:
    """Raise InvalidRequestError for what is longer than the model takes."""
    if input_len + output_len > max_model_len:
        raise InvalidRequestError(f"{what} has {input_len} + {output_len} tokens; max_model_len={max_model_len}")


def run_batch(engine: LLMEngine, batch: list[Work], n: int) -> Timing:
    """All requests at once, sampled at temperature 1. Raises the error of a request that failed."""
    shared = SamplingParams(n=n, temperature=1.0, ignore_eos=True)
    requests = [(str(index), work.prompt, shared.replace(max_tokens=work.output_len)) for index, work in enumerate(batch)]
    first: list[float] = []
    gaps: list[float] = []
    seen: dict[tuple[str, int], tuple[int, float]] = {}
    start = now = time.perf_counter()
    for request in requests:
        engine.add_request(*request)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise output.error
            for completion in output.outputs:
                key, count = (output.request_id, completion.index), len(completion.token_ids)
                before, then = seen.get(key, (0, start))
                if count > before:
                    (gaps if before else first).append(now - then)
                    seen[key] = (count, now)
    return Timing(now - start, first, gaps, sum(count for count, _ in seen.values()))


def percentiles(values: list[float]) -> dict[str, float]:
    """`mean`, `median`, `p90` and `p99`; nothing of no values."""
    if not values:
        return {}
    points = zip(("median", "p90", "p99"), np.percentile(values, (50, 90, 99)).tolist(), strict=True)
    return {"mean": float(np.mean(values)), **dict(points)}


def write_result(file: Path, result: dict[str, Any], config: EngineConfig) -> None:
    """A result with the settings and the machine that it belongs to, as one JSON object."""
    settings = {"engine": msgspec.to_builtins(config), "machine": machine_facts()}
    file.write_text(json.dumps({"model": config.model, **result, **settings}, indent=2) + "\n")


def check_writable(file: Path | None, flag: str = "output_json") -> None:
    """Before the minutes that the work may take."""
    if file is None:
        return
    reason = None
    if not file.parent.is_dir():
        reason = f"there is no folder {str(file.parent)!r}"
    elif file.is_dir():
        reason = "it is a folder"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        reason = "it can't be written"
    if reason:
        raise InvalidRequestError(f"{flag}={str(file)!r}: {reason}")

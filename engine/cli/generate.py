"""`pagefork generate`: complete prompts in one batch and show the text as it comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pagefork.cli.flags import Given
from pagefork.cli.strategy import STRATEGIES, Preset, Strategy, ValueFn, fields_of_others, strategy_params
from pagefork.cli.text import decoded
from pagefork.cli.view import View, choose_view
from pagefork.config import EngineConfig
from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.search_params import BeamSearchParams

if TYPE_CHECKING:
    from pagefork.core import LLMEngine

DEFAULT_ENGINE = {"model": "demo"}


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to go on from; '' is allowed")] = None,
    *,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file")] = None,
    lines: Annotated[
        bool, typer.Option(help="Every line of the file or of standard input is a prompt, an empty one too")
    ] = False,
    json: Annotated[bool, typer.Option(help="Print one JSON object per prompt at the end")] = False,
    strategy: Annotated[
        Strategy, typer.Option(help="How tokens are chosen; a flag that it has no use for is refused")
    ] = "sample",
    preset: Preset = None,
    value_fn: ValueFn = None,
    params: Annotated[Given, STRATEGIES, fields_of_others],
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Complete one or more prompts in one batch.

    Prompts come from the arguments, from --file, or from standard input. The text of a single output is
    printed as it comes; several outputs are labelled.
    """
    texts = _read_prompts(prompts or [], file, lines=lines)
    batch = [strategy_params(strategy, params, preset, value_fn, text) for text in texts]
    chosen = batch[0]
    for name in ("logprobs", "prompt_logprobs", "trace"):
        if not json and getattr(chosen, name, None) not in (None, False):
            flag = name.replace("_", "-")
            raise InvalidRequestError(f"--{flag} asks for what only --json prints: add --json, or leave --{flag} out")
    config = engine_config(engine, chosen)
    view = choose_view(texts, getattr(chosen, "n", 1), json=json, scored=isinstance(chosen, BeamSearchParams))
    from pagefork import LLMEngine

    run(LLMEngine(config), texts, batch, view)


def engine_config(given: Given, params: CommonParams | None = None) -> EngineConfig:
    """What was given, over the defaults of the command line and what `params` need."""
    needed = {"hidden_states": True} if params is not None and params.needs_hidden_states else {}
    return EngineConfig(**{**DEFAULT_ENGINE, **needed, **given})


def run(engine: LLMEngine, prompts: list[str], params: Sequence[CommonParams], view: View) -> None:
    """Generate for all prompts at once, each with its own parameters.

    Raises InvalidRequestError for a prompt that is refused, which it names by its number if there are several, before
    anything runs; and the error of the first request that failed, after the others ended.
    """
    for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        try:
            engine.add_request(str(index), prompt, wanted)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"prompt {index + 1}: {error}" if len(prompts) > 1 else str(error)) from None
    failed = []
    with view:
        while engine.has_unfinished_requests():
            for output in engine.step():
                view.show(int(output.request_id), output)
                if output.error is not None:
                    failed.append(output.error)
    if failed:
        raise failed[0]


def _read_prompts(prompts: list[str], file: Path | None, *, lines: bool) -> list[str]:
    if prompts:
        if file is not None or lines:
            raise InvalidRequestError("prompts are given as arguments and with --file or --lines; only one of them is allowed")
        return prompts
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InvalidRequestError("no prompt is given: name one as an argument, with --file, or on standard input")
    source = str(file) if file else "standard input"
    data = file.read_bytes() if file else sys.stdin.buffer.read()
    text = decoded(data, source).removesuffix("\n")
    found = [line.removesuffix("\r") for line in text.split("\n")] if lines else [text]
    if found == [""]:
        raise InvalidRequestError(f"{source} is empty; the empty prompt is given as an argument: ''")
    return found

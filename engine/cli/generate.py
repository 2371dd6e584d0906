"""`pagefork generate`: complete prompts in one batch and show the text as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pagefork.cli.flags import Given
from pagefork.cli.text import decoded
from pagefork.cli.view import View, choose_view
from pagefork.config import EngineConfig
from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import PRESETS, SamplingParams

if TYPE_CHECKING:
    from pagefork.core import LLMEngine

DEFAULT_ENGINE = {"model": "demo"}
Preset = Annotated[str | None, typer.Option(help=f"Settings for a purpose: {', '.join(PRESETS)}; single flags win")]


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to go on from; '' is allowed")] = None,
    *,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file")] = None,
    lines: Annotated[
        bool, typer.Option(help="Every line of the file or of standard input is a prompt, an empty one too")
    ] = False,
    json: Annotated[bool, typer.Option(help="Print one JSON object per prompt at the end")] = False,
    preset: Preset = None,
    params: Annotated[Given, SamplingParams],
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Complete one or more prompts in one batch.

    Prompts come from the arguments, from --file, or from standard input. The text of a single output is
    printed as it comes; several outputs are labelled.
    """
    texts = _read_prompts(prompts or [], file, lines=lines)
    sampling = sampling_params(preset, params)
    if not json and (sampling.logprobs is not None or sampling.prompt_logprobs is not None):
        raise InvalidRequestError("log-probs are printed by --json only: add it, or leave --logprobs and --prompt-logprobs out")
    config = EngineConfig(**{**DEFAULT_ENGINE, **engine})
    view = choose_view(texts, sampling.n, json=json)
    from pagefork.core import LLMEngine

    run(LLMEngine(config), texts, sampling, view)


def sampling_params(preset: str | None, given: Given) -> SamplingParams:
    """What was given, over the preset if there is one."""
    return SamplingParams(**given) if preset is None else SamplingParams.preset(preset, **given)


def run(engine: LLMEngine, prompts: list[str], params: SamplingParams, view: View) -> None:
    """Generate for all prompts at once.

    Raises InvalidRequestError for a prompt that is refused, which it names by its number if there are several, before
    anything runs; and the error of the first request that failed, after the others ended.
    """
    for index, prompt in enumerate(prompts):
        try:
            engine.add_request(str(index), prompt, params)
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

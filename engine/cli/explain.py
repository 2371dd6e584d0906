"""`pagefork explain --next`: the distribution of the next token, and what the sampling parameters make of it."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import Meta

from pagefork.cli.flags import Given
from pagefork.cli.generate import DEFAULT_ENGINE, Preset, sampling_params
from pagefork.cli.text import label
from pagefork.config import EngineConfig
from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import SamplingParams

if TYPE_CHECKING:
    from pagefork.cli.next_token import Column
    from pagefork.core import LLMEngine
    from pagefork.outputs import Logprob

NOT_OF_THE_FIRST_TOKEN = {
    *("n", "best_of", "max_tokens", "stop", "include_stop_str_in_output", "skip_special_tokens", "seed"),
    *("frequency_penalty", "presence_penalty", "logprobs", "prompt_logprobs", "logprobs_mode"),
}
TOKEN_WIDTH = 14


def explain(
    *,
    next: Annotated[str | None, typer.Option(metavar="PROMPT", help="The text whose next token is explained")] = None,  # noqa: A002
    top: Annotated[int, Meta(ge=1), typer.Option(min=1, help="Tokens shown, the most probable first")] = 12,
    json: Annotated[bool, typer.Option(help="Print one JSON object")] = False,
    preset: Preset = None,
    params: Annotated[Given, SamplingParams, NOT_OF_THE_FIRST_TOKEN],
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Tabulate the probabilities of the next token under several settings, and under the sampling flags that are given.

    A dash stands for a token that a setting takes out; the others share its mass. Entropy is in bits.
    Any --min-tokens above 0 bans the end tokens here, since one token is generated.
    """
    if next is None:
        raise InvalidRequestError("explain needs a text: give it with --next")
    sampling = sampling_params(preset, {"max_tokens": None, **params})
    config = EngineConfig(**{**DEFAULT_ENGINE, **engine})
    from pagefork.cli.next_token import columns, logits_of
    from pagefork.core import LLMEngine

    llm = LLMEngine(config)
    raw = _first_token(llm, next, SamplingParams(temperature=0))
    found = columns(logits_of(raw))
    if params or preset is not None:
        found.append(_given(llm, next, sampling))
    ranked = sorted(raw, key=lambda token: (-raw[token].logprob, token))[:top]
    if json:
        print(json_module.dumps(_as_json(next, ranked, raw, found)))
    else:
        _print_table(next, ranked, raw, found)


def _first_token(llm: LLMEngine, prompt: str, params: SamplingParams) -> dict[int, Logprob]:
    """The log-prob of every token of the vocabulary."""
    alone = {"max_tokens": 1, "min_tokens": min(1, params.min_tokens), "logprobs": -1}
    llm.add_request("explain", prompt, params.replace(**alone))
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.error is not None:
                raise output.error
    return (output.outputs[0].logprobs or [])[0]


def _given(llm: LLMEngine, prompt: str, params: SamplingParams) -> Column:
    """What the flags of the command line leave, through the whole pipeline of the engine."""
    from pagefork.cli.next_token import column, logits_of

    logits = logits_of(_first_token(llm, prompt, params.replace(logprobs_mode="processed")))
    if params.greedy:
        best = logits.argmax()  # the first of equal ones
        logits = logits.new_full(logits.shape, -float("inf")).index_fill_(0, best, 0.0)
    return column("given flags", logits)


def _as_json(prompt: str, ranked: list[int], raw: dict[int, Logprob], found: list[Column]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "settings": [{"name": column.name, "kept": column.kept, "entropy_bits": column.entropy} for column in found],
        "tokens": [
            {
                "token_id": token,
                "text": raw[token].decoded_token,
                "logprob": raw[token].logprob,
                "probabilities": {column.name: float(column.probabilities[token]) for column in found},
            }
            for token in ranked
        ],
    }


def _print_table(prompt: str, ranked: list[int], raw: dict[int, Logprob], found: list[Column]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("token", no_wrap=True, overflow="ellipsis", max_width=TOKEN_WIDTH)
    for column in found:
        table.add_column(column.name.replace(" ", "\n"), justify="right", no_wrap=True, min_width=5)
    for token in ranked:
        table.add_row(label(raw[token].decoded_token or ""), *(_chance(column, token) for column in found))
    table.add_section()
    table.add_row("tokens kept", *(str(column.kept) for column in found))
    table.add_row("entropy", *(f"{column.entropy:.2f}" for column in found))
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"Next token after {label(prompt)}", soft_wrap=True)
    console.print(table)


def _chance(column: Column, token: int) -> str:
    if not column.is_kept[token]:
        return "-"
    chance = float(column.probabilities[token])
    return "<.001" if chance < 0.0005 else f"{chance:.3f}".removeprefix("0")

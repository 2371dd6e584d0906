"""`pagefork explain`: the distribution of the next token, or how a search came to its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from msgspec import Meta

from pagefork.cli.flags import Given
from pagefork.cli.generate import DEFAULT_ENGINE, engine_config
from pagefork.cli.settings import Settings
from pagefork.cli.strategy import STRATEGIES, Preset, Strategy, ValueFn, fields_of_others, sampling_params, strategy_params
from pagefork.config import EngineConfig
from pagefork.scheduler.errors import InvalidRequestError

HIDDEN = {"best_of", "logprobs", "prompt_logprobs", "logprobs_mode", "trace"}
NOT_OF_THE_FIRST_TOKEN = {
    *("n", "max_tokens", "stop", "include_stop_str_in_output", "skip_special_tokens", "seed"),
    *("frequency_penalty", "presence_penalty"),
}
TOP_OF_NEXT, TOP_OF_SEARCH, DEPTH = 12, 8, 2
DEFAULT_PARAMS = {"max_tokens": 12}  # of a search


def meant_for_others(layer: Settings, below: Settings) -> set[str]:
    """What a layer with --next, or with a search, leaves no room for in the layers below it."""
    if layer.get("next") is not None:
        other = {"strategy", "html", "depth", "value_fn"} | fields_of_others({"strategy": "sample"}, below)
        return other | NOT_OF_THE_FIRST_TOKEN
    gone = fields_of_others(layer, below) | ({"next"} if "strategy" in layer else set())
    return gone | {"depth"} if layer.get("strategy", "mcts") != "mcts" else gone


def explain(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text from which a search goes on")] = None,
    *,
    next: Annotated[str | None, typer.Option(metavar="PROMPT", help="The text whose next token is explained")] = None,  # noqa: A002
    strategy: Annotated[Strategy | None, typer.Option(help="The search that is explained: any but sample")] = None,
    top: Annotated[
        int | None,
        Meta(ge=1),
        typer.Option(min=1, help=f"Tokens shown (default {TOP_OF_NEXT}), or candidates of a step (default {TOP_OF_SEARCH})"),
    ] = None,
    depth: Annotated[
        int | None, Meta(ge=1), typer.Option(min=1, help=f"Levels of the tree of mcts that are printed (default {DEPTH})")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page to step through the search with")] = None,
    json: Annotated[bool, typer.Option(help="Print one JSON object")] = False,
    preset: Preset = None,
    value_fn: ValueFn = None,
    params: Annotated[Given, STRATEGIES, HIDDEN, meant_for_others] = DEFAULT_PARAMS,
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Show how tokens are chosen.

    --next PROMPT tabulates the probabilities of the next token under several settings, and under the sampling flags that
    are given. A dash stands for a token that a setting takes out; the others share its mass. Entropy is in bits. Any
    --min-tokens above 0 bans the end tokens there, since one token is generated.

    --strategy beam, contrastive or mcts with a PROMPT runs that search and draws what it weighed at every token.
    """
    if next is not None:
        if prompt is not None or strategy is not None:
            raise InvalidRequestError("explain takes either --next with its text, or --strategy and a prompt")
        _check_next(params, {"--depth": depth, "--html": html, "--value-fn": value_fn})
        sampling = sampling_params(preset, {**params, "max_tokens": None})
        config = engine_config(engine)
        from pagefork import LLMEngine
        from pagefork.cli.next_token import show_next_token

        given = sampling if params or preset is not None else None
        show_next_token(LLMEngine(config), next, given, top or TOP_OF_NEXT, json=json)
        return
    if prompt is None or strategy in (None, "sample"):
        raise InvalidRequestError("explain needs a text: give it with --next, or after --strategy beam, contrastive or mcts")
    if depth is not None and strategy != "mcts":
        raise InvalidRequestError(f"--depth limits the tree of mcts, and --strategy is {strategy}")
    chosen = strategy_params(strategy, {**DEFAULT_PARAMS, **params, "trace": True}, preset, value_fn, prompt)
    config = engine_config(engine, chosen)
    from pagefork import LLMEngine
    from pagefork.cli.load import check_writable
    from pagefork.cli.search import Shown, show_search

    check_writable(html, "html")
    shown = Shown(top=top or TOP_OF_SEARCH, depth=depth or DEPTH, json=json, html=html)
    show_search(LLMEngine(config), prompt, chosen, shown)


def _check_next(params: Given, others: Given) -> None:
    given = [flag for flag, value in others.items() if value is not None]
    given += [f"--{name.replace('_', '-')}" for name in params if name in NOT_OF_THE_FIRST_TOKEN]
    if given:
        raise InvalidRequestError(f"explain --next looks at a single token, for which {', '.join(given)} changes nothing")

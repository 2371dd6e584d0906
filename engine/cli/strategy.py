"""The decoding strategies as a command line names them, and their parameters from its flags."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from pagefork.cli.flags import Given, Structs
from pagefork.cli.settings import Settings
from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import PRESETS, CommonParams, SamplingParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams
from pagefork.value_functions import VALUE_FUNCTIONS

STRATEGIES: Structs = {
    "sample": SamplingParams,
    "beam": BeamSearchParams,
    "contrastive": ContrastiveSearchParams,
    "mcts": MCTSParams,
}
Strategy = Literal["sample", "beam", "contrastive", "mcts"]
Preset = Annotated[str | None, typer.Option(help=f"Settings for a purpose: {', '.join(PRESETS)}; single flags win")]
ValueFn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"What a leaf of mcts is worth: {', '.join(VALUE_FUNCTIONS)}; without it, the first"),
]


# Settings of one name that mean something else to each strategy.
OF_ITS_OWN = {"n", "temperature", "top_k"}


def fields_of_others(layer: Settings, below: Settings) -> set[str]:
    """What the layers below are to forget where a layer names a strategy: settings that it does not have.

    Where they were meant for another strategy also those that mean something else to this one.
    """
    name = layer.get("strategy")
    own = STRATEGIES.get(name or "")
    if own is None:
        return set()
    every = {name for struct in STRATEGIES.values() for name in struct.__struct_fields__}
    gone = every.difference(own.__struct_fields__) | (set() if own is SamplingParams else {"preset"})
    return gone if below.get("strategy", "sample") == name else gone | OF_ITS_OWN


def sampling_params(preset: str | None, given: Given) -> SamplingParams:
    """What was given, over the preset if there is one."""
    return SamplingParams(**given) if preset is None else SamplingParams.preset(preset, **given)


def strategy_params(strategy: Strategy, given: Given, preset: str | None, value_fn: str | None, prompt: str) -> CommonParams:
    """The parameters of a strategy for a prompt, which the value function is made for.

    Raises ParameterError for a setting that the strategy does not have, InvalidRequestError for a preset of another one and
    for a value function that there isn't.
    """
    if strategy == "sample" and value_fn is None:
        return sampling_params(preset, given)
    if preset is not None:
        raise InvalidRequestError("--preset makes settings of --strategy sample: leave one of them out")
    struct: Any = STRATEGIES[strategy]
    if value_fn is not None:
        given = {**given, "value_fn": _value_function(value_fn, prompt) if strategy == "mcts" else value_fn}
    params: CommonParams = struct(**given)
    return params


def _value_function(name: str, prompt: str) -> Any:
    if name not in VALUE_FUNCTIONS:
        raise InvalidRequestError(f"there is no value function {name!r}; there are {', '.join(VALUE_FUNCTIONS)}")
    return VALUE_FUNCTIONS[name](prompt)

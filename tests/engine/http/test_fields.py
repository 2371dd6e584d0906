"""Every field of OpenAI's API is honoured, meaningless or refused, and the documentation says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chat

from pagefork import BeamSearchParams, ContrastiveSearchParams, MCTSParams, ParameterError, SamplingParams
from pagefork.http.errors import ApiError
from pagefork.http.fields import CHAT, COMPLETION, Route, Use, params_of

DOCUMENT = Path(__file__).parents[3] / "docs" / "http.md"
ROUTES = {"completions": (COMPLETION, of_completions), "chat": (CHAT, of_chat)}
LEAST = {"model": "demo", "prompt": "def f("}


def read(**fields: Any) -> Any:
    return params_of(COMPLETION.read(LEAST | fields), {}, {})


@pytest.mark.parametrize(("route", "openai"), ROUTES.values(), ids=ROUTES)
def test_every_field_of_openai_is_in_one_class(route: Route, openai: Any) -> None:
    theirs = {*openai.CompletionCreateParamsNonStreaming.__annotations__, *openai.CompletionCreateParamsStreaming.__annotations__}
    theirs |= {*openai.CompletionCreateParamsBase.__annotations__}
    assert theirs - route.uses.keys() == set()
    assert {*route.struct.__struct_fields__} == {name for name, use in route.uses.items() if use is not Use.REFUSED}


@pytest.mark.parametrize("at", range(2), ids=ROUTES)
def test_the_documentation_says_what_becomes_of_every_field(at: int) -> None:
    route = [*ROUTES.values()][at][0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")
    ]
    told = {name.strip("`"): cells[at] for name, *cells in rows if len(cells) == 2}
    assert {name: use for name, use in told.items() if use} == {name: str(use) for name, use in route.uses.items()}


@pytest.mark.parametrize(("route", "openai"), ROUTES.values(), ids=ROUTES)
def test_a_refused_field_is_named_unless_it_asks_for_nothing(route: Route, openai: Any) -> None:
    least = {"model": "demo", "prompt": "x"} if route is COMPLETION else {"model": "demo", "messages": [{}]}
    for name, trivial in route.refused.items():
        for value in [None, *trivial]:
            route.read(least | {name: value})
        with pytest.raises(ApiError, match=name) as caught:
            route.read(least | {name: "something"})
        assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")


def test_an_absent_or_null_field_is_the_default() -> None:
    assert read() == SamplingParams()
    optional = COMPLETION.uses.keys() - LEAST.keys()
    assert read(**dict.fromkeys(optional)) == SamplingParams()


def test_fields_become_the_parameters_of_the_same_name() -> None:
    given: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_k": 7,
        "stop": ["a", "b"],
        "logit_bias": {"5": -3},
        "seed": 4,
        "bad_words": ["x"],
    }
    expected: dict[str, Any] = {**given, "logit_bias": {5: -3.0}}
    assert read(**given) == SamplingParams(**expected)
    assert read(stop="a").stop == ["a"]


def test_a_search_has_the_fields_of_its_parameters_and_the_common_ones_from_outside() -> None:
    assert read(beam_search={"beam_width": 3, "early_stopping": "never"}, max_tokens=5, n=2) == BeamSearchParams(
        beam_width=3, early_stopping="never", max_tokens=5, n=2
    )
    assert read(contrastive_search={"alpha": 0.5, "window": None}, stop=["x"]) == ContrastiveSearchParams(alpha=0.5, stop=["x"])
    found = read(mcts={"value_fn": "parses_as_python", "num_simulations": 3}, temperature=0.5, seed=1)
    assert found == MCTSParams(value_fn="parses_as_python", num_simulations=3, temperature=0.5, seed=1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temprature": 1}, "'temprature'"),
        ({"max_new_tokens": 1}, "max_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"beam_search": {}, "mcts": {}}, "one strategy"),
        ({"beam_search": {"n": 2}, "n": 2}, "n is given twice"),
        ({"beam_search": {}, "top_p": 0.5}, "'top_p'"),
        ({"contrastive_search": {}, "n": 1}, "'n'"),
        ({"beam_search": {"top_p": 0.5}}, "top_p"),
        ({"beam_search": {"beam_width": "4"}}, "beam_width"),
        ({"mcts": {"value_fn": 5}}, "value_fn"),
        ({"trace": True}, "trace"),
        ({"rank_by": "x"}, "rank_by"),
        ({"type": "beam"}, "type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises((ApiError, ParameterError), match=said):
        read(**fields)


def test_the_schema_of_a_body_can_be_generated_and_refuses_other_fields() -> None:
    for route, _ in ROUTES.values():
        schema = msgspec.json.schema(route.struct)
        [definition] = [found for name, found in schema["$defs"].items() if name == route.struct.__name__]
        assert definition["additionalProperties"] is False and {*definition["properties"]} == {*route.struct.__struct_fields__}

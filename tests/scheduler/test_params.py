"""Parameters are checked when they are made, with errors that name what was given and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from pagefork.scheduler.errors import PageforkError, ParameterError
from pagefork.scheduler.params import PRESETS, CommonParams, SamplingParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": math.nan}, "temperature=nan is refused: it is not a finite number"),
    ({"temperature": -0.1}, "temperature=-0.1 is refused"),
    ({"temperature": "hot"}, "temperature='hot' is refused: Expected `float`"),
    ({"max_tokens": 0}, "max_tokens=0 is refused: Expected `int` >= 1"),
    ({"max_tokens": True}, "max_tokens=True is refused: Expected `int . null`, got `bool`"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is larger than max_tokens=4"),
    ({"top_p": 0}, "top_p=0 is refused"),
    ({"top_p": 1.01}, "top_p=1.01 is refused"),
    ({"top_k": -2}, "top_k=-2 is refused"),
    ({"min_p": -0.5}, "min_p=-0.5 is refused"),
    ({"repetition_penalty": 0}, "repetition_penalty=0 is refused"),
    ({"frequency_penalty": 2.5}, "frequency_penalty=2.5 is refused"),
    ({"presence_penalty": math.inf}, "presence_penalty=inf is refused: it is not a finite number"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
    ({"stop": [""]}, "stop="),
    ({"stop": 3}, "stop=3 is refused"),
    ({"stop_token_ids": [-1]}, "stop_token_ids="),
    ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\]=nan is not a finite"),
    ({"logit_bias": {1: 1e300}}, r"logit_bias\[1\]=1e\+300 is not a finite 32-bit float"),
    ({"repetition_penalty": 1e300}, "repetition_penalty=1e.300 is refused: it does not fit a 32-bit float"),
    ({"repetition_penalty": 1e-300}, "does not fit a 32-bit float"),
    ({"temperature": 1e300}, "does not fit a 32-bit float"),
    ({"allowed_token_ids": []}, "allowed_token_ids="),
    ({"logprobs": -2}, "logprobs=-2"),
    ({"n": 0}, "n=0 is refused"),
    ({"n": 3, "best_of": 2}, "best_of=2 is smaller than n=3"),
    ({"n": 2, "temperature": 0}, "temperature=0 is greedy"),
    ({"rank_by": len}, "rank_by ranks the candidates of best_of"),
    ({"rank_by": 3, "best_of": 2}, "rank_by=3 is refused: it is not callable"),
    ({"seed": -1}, "seed=-1"),
    ({"top_k": 2**63}, "top_k=9223372036854775808 is refused"),
    ({"no_repeat_ngram_size": 2**31}, "no_repeat_ngram_size=2147483648 is refused"),
    ({"logprobs_mode": "cooked"}, "logprobs_mode='cooked' is refused: it is one of 'raw', 'processed'"),
    ({"num_beams": 4}, r"no parameter 'num_beams'; here it is called BeamSearchParams\(beam_width="),
    ({"max_new_tokens": 4}, "no parameter 'max_new_tokens'; here it is called max_tokens"),
    ({"num_return_sequences": 4}, "here it is called n"),
    ({"tempreature": 1}, "no parameter 'tempreature'; it has max_tokens"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_what_can_not_be_honoured_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        SamplingParams(**fields)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, PageforkError)


def test_decoding_checks_what_construction_checks() -> None:
    assert msgspec.json.decode(b'{"type": "sampling", "top_k": 5}', type=SamplingParams).top_k == 5
    for body in (
        b'{"type": "sampling", "top_k": -5}',
        b'{"type": "sampling", "top_q": 1}',
        b'{"type": "sampling", "n": 2, "temperature": 0}',
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(body, type=SamplingParams)


def test_presets_exist_and_overrides_win() -> None:
    for name, values in PRESETS.items():
        preset = SamplingParams.preset(name)
        assert {field: getattr(preset, field) for field in values} == values
    assert SamplingParams.preset("chat", temperature=0.1).temperature == 0.1
    with pytest.raises(ParameterError, match=r"no preset 'codes'; there are code, factual"):
        SamplingParams.preset("codes")


def test_a_changed_copy_is_checked_again() -> None:
    assert SamplingParams(top_k=3).replace(top_k=4).top_k == 4
    with pytest.raises(ParameterError, match="top_p=2"):
        SamplingParams().replace(top_p=2)


def test_one_stop_text_may_be_given_bare() -> None:
    assert SamplingParams(stop="end").stop == ["end"]


def test_positional_values_are_refused() -> None:
    with pytest.raises(ParameterError, match="name every parameter"):
        SamplingParams(0.5)  # type: ignore[misc]


def test_lists_that_were_checked_do_not_change_with_the_callers() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[2] = math.nan
    assert (params.stop, params.logit_bias) == (["a"], {1: 2.0})


SEARCHES_REFUSED: list[tuple[type[CommonParams], dict[str, Any], str]] = [
    (BeamSearchParams, {"beam_width": 0}, "beam_width=0"),
    (BeamSearchParams, {"beam_width": 4, "n": 5}, "n=5 outputs are more than beam_width=4 can give"),
    (BeamSearchParams, {"beam_width": 4, "num_beam_groups": 3}, "num_beam_groups=3 does not divide beam_width=4"),
    (BeamSearchParams, {"diversity_penalty": 0.5}, "num_beam_groups is 1"),
    (BeamSearchParams, {"early_stopping": "always"}, "it is one of True, False, 'never'"),
    (BeamSearchParams, {"length_penalty": math.inf}, "it is not a finite number"),
    (BeamSearchParams, {"temperature": 0.5}, "no parameter 'temperature'; it belongs to SamplingParams and MCTSParams"),
    (ContrastiveSearchParams, {"alpha": 1.5}, "alpha=1.5"),
    (ContrastiveSearchParams, {"alpha": -0.1}, "alpha=-0.1"),
    (ContrastiveSearchParams, {"top_k": 0}, "top_k=0"),
    (ContrastiveSearchParams, {"window": 0}, "window=0"),
    (ContrastiveSearchParams, {"n": 2}, "ContrastiveSearchParams has no parameter 'n'"),
    (MCTSParams, {"num_simulations": 0}, "num_simulations=0"),
    (MCTSParams, {"n": 2}, "visit_temperature=0 takes the most visited token"),
    (MCTSParams, {"temperature": 0.0}, "temperature=0.0"),
    (MCTSParams, {"value_fn": 3}, "value_fn=3 is refused: it is a function, or the name of one"),
    (MCTSParams, {"selection": "random"}, "it is one of 'puct', 'ucb1'"),
    (SamplingParams, {"beam_width": 4}, "no parameter 'beam_width'; it belongs to BeamSearchParams"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), SEARCHES_REFUSED, ids=str)
def test_searches_refuse_what_they_can_not_honour_by_name(kind: type[CommonParams], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        kind(**fields)

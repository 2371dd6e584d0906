"""Flags made from the fields of Structs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import pytest
import typer
from msgspec import Meta
from support.cli import PROMPT, assert_refused, generated, pagefork
from typer.testing import CliRunner

from pagefork import EngineConfig, ParameterError, SamplingParams
from pagefork.cli.fields import fields_of
from pagefork.cli.flags import Given, command
from pagefork.cli.strategy import STRATEGIES, Strategy, strategy_params

LENGTH = ["--max-tokens", "4"]


def parsed(*arguments: str) -> tuple[Given, Given]:
    """What a command gets for its two Structs."""
    app, got = typer.Typer(), []

    @command(app)
    def both(*, params: Annotated[Given, STRATEGIES], engine: Annotated[Given, EngineConfig]) -> None:
        got.append((params, engine))

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return got[0]


def test_every_field_that_is_not_a_function_has_a_flag() -> None:
    shown = pagefork("generate", "--help").stdout
    structs: list[type[msgspec.Struct]] = [*STRATEGIES.values(), EngineConfig]
    names = [name for struct in structs for name in struct.__struct_fields__]
    assert {name for name in names if f"--{name.replace('_', '-')}" not in shown} == {"rank_by", "logits_processors"}


class Left(msgspec.Struct):
    """Shares a flag of another meaning, and one of the same."""

    level: Annotated[int, Meta(ge=0, le=3, description="How high")] = 1
    name: Annotated[str, Meta(description="What it is called")] = "x"
    mode: bool | Literal["never"] = False


class Right(msgspec.Struct):
    level: Annotated[int, Meta(ge=2, description="How deep")] = 5
    name: Annotated[str, Meta(description="What it is called")] = "x"
    weight: Annotated[float, Meta(description="In tons")] = 0.5


def of_one(*arguments: str, **environment: str) -> tuple[Given, str]:
    """What a command gets that takes the fields of one of two Structs, and its help."""
    app, got = typer.Typer(rich_markup_mode=None), []

    @command(app)
    def one(*, params: Annotated[Given, {"left": Left, "right": Right}]) -> None:
        got.append(params)

    result = CliRunner(env=environment).invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return got[0], " ".join(CliRunner().invoke(app, ["--help"]).output.split())


def test_equal_names_of_several_structs_share_a_flag_whose_help_tells_them_apart() -> None:
    given, shown = of_one("--level", "3", "--weight", "2", "--name", "y")
    assert given == {"level": 3, "weight": 2.0, "name": "y"}
    assert shown.count("--level") == shown.count("--name") == 1
    assert "left: How high (>= 0, <= 3, default 1); right: How deep (>= 2, default 5)" in shown
    assert "What it is called (default x) " in shown
    assert "For left: --mode <true|false|never>" in shown and "For right: --weight <float> In tons (default 0.5)" in shown


def test_a_shared_flag_takes_from_the_environment_what_any_of_the_structs_allows() -> None:
    assert [of_one(PAGEFORK_LEVEL=text)[0] for text in ("0", "3", "9")] == [{"level": 0}, {"level": 3}, {"level": 9}]
    assert_refused(pagefork("generate", "x", PAGEFORK_TOP_K="-2"), "PAGEFORK_TOP_K", ">= -1")


@pytest.mark.parametrize(("word", "value"), [("true", True), ("false", False), ("never", "never")])
def test_a_choice_between_truth_and_words_is_made_by_words(word: str, value: bool | str) -> None:
    assert of_one("--mode", word)[0] == {"mode": value}
    outputs = generated("--strategy", "beam", "--early-stopping", word, *LENGTH, PROMPT)[0]["outputs"]
    assert outputs == generated("--strategy", "beam", *LENGTH, PROMPT, PAGEFORK_EARLY_STOPPING=word)[0]["outputs"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_flag_of_another_strategy_is_refused_by_the_parameters_of_the_chosen_one(strategy: Strategy) -> None:
    own = STRATEGIES[strategy].__struct_fields__
    fields = {field.name: field for struct in STRATEGIES.values() for field in fields_of(struct) if field.name not in own}
    assert len(fields) > 10
    for name, field in fields.items():
        with pytest.raises(ParameterError, match=f"{STRATEGIES[strategy].__name__} has no parameter '{name}'"):
            strategy_params(strategy, {name: field.default}, None, None, "x")
    if strategy != "mcts":
        done = pagefork("generate", "--strategy", strategy, "--max-depth", "3", "x")
        assert_refused(done, f"{STRATEGIES[strategy].__name__} has no parameter 'max_depth'")
        assert_refused(pagefork("generate", "--strategy", strategy, "--value-fn", "x", "x"), "'value_fn'", "MCTSParams")


def test_the_owner_of_a_flag_and_the_strategies_that_there_are_are_named() -> None:
    assert_refused(pagefork("generate", "--beam-width", "3", "x"), "SamplingParams", "belongs to BeamSearchParams")
    assert_refused(pagefork("generate", "--strategy", "greedy", "x"), "--strategy", "contrastive")


@pytest.mark.parametrize("struct", [*STRATEGIES.values(), EngineConfig])
def test_none_is_a_value_of_every_optional_number(struct: type[msgspec.Struct]) -> None:
    names = {field.name for field in fields_of(struct) if field.optional and field.kind in (int, float)}
    assert len(names) > 1
    given = [text for name in names for text in (f"--{name.replace('_', '-')}", "none")]
    assert dict.fromkeys(names) in parsed(*given)


def test_what_is_neither_a_number_nor_none_is_refused() -> None:
    assert_refused(pagefork("generate", "--seed", "nothing", "x"), "'nothing'", "integer", "none")


def test_only_given_flags_arrive_each_in_the_type_of_its_field() -> None:
    assert parsed() == ({}, {})
    params, engine = parsed(
        *("--max-tokens", "none", "--stop", "a", "--stop", "b", "--stop-token-ids", "3", "--top-k", "-1", "--temperature", "0.5"),
        *("--logit-bias", "5=1.5", "--logit-bias", "6=-2", "--ignore-eos", "--no-skip-special-tokens"),
        *("--logprobs-mode", "processed", "--seed", "7"),
        *("--engine-seed", "8", "--no-enable-prefix-caching", "--kv-cache-memory", "4096", "--dtype", "float32"),
    )
    assert params == {
        "max_tokens": None,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "top_k": -1,
        "temperature": 0.5,
        "logit_bias": {5: 1.5, 6: -2.0},
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs_mode": "processed",
        "seed": 7,
    }
    assert engine == {"seed": 8, "enable_prefix_caching": False, "kv_cache_memory": 4096, "dtype": "float32"}
    assert SamplingParams(**params).max_tokens is None

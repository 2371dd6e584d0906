"""Flags made from the fields of Structs."""

from __future__ import annotations

from typing import Annotated

import msgspec
import pytest
import typer
from support.cli import assert_refused, pagefork
from typer.testing import CliRunner

from pagefork import EngineConfig, SamplingParams
from pagefork.cli.fields import fields_of
from pagefork.cli.flags import Given, command


def parsed(*arguments: str) -> tuple[Given, Given]:
    """What a command gets for its two Structs."""
    app, got = typer.Typer(), []

    @command(app)
    def both(*, params: Annotated[Given, SamplingParams], engine: Annotated[Given, EngineConfig]) -> None:
        got.append((params, engine))

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return got[0]


def test_every_field_that_is_not_a_function_has_a_flag() -> None:
    shown = pagefork("generate", "--help").stdout
    names = [*SamplingParams.__struct_fields__, *EngineConfig.__struct_fields__]
    assert {name for name in names if f"--{name.replace('_', '-')}" not in shown} == {"rank_by", "logits_processors"}


@pytest.mark.parametrize("struct", [SamplingParams, EngineConfig])
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

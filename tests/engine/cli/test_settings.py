"""Settings from a file and from the environment: the same as flags, in a fixed order, and nothing is ignored silently."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from support.cli import PROMPT, assert_refused, generated, pagefork
from typer.testing import CliRunner

from pagefork import EngineConfig, SamplingParams
from pagefork.cli.flags import Given, command

DOCUMENT = Path(__file__).parents[3] / "docs/configuration.md"
FLAGS = [
    *("--max-tokens", "none", "--stop", "a b", "--stop", '"', "--stop-token-ids", "3", "--top-k", "-1", "--temperature", "0.5"),
    *("--logit-bias", "5=1.5", "--logit-bias", "6=-2", "--ignore-eos", "--no-skip-special-tokens", "--seed", "7"),
    *("--engine-seed", "8", "--no-enable-prefix-caching", "--kv-cache-memory", "4096", "--dtype", "float32", "--level", "2"),
]
FILE = """
max_tokens = "none"
stop = ["a b", '"']
stop-token-ids = [3]
top-k = -1
temperature = 0.5
logit-bias = { 5 = 1.5, 6 = -2 }
ignore-eos = true
skip-special-tokens = false
seed = 7
engine-seed = 8
enable_prefix_caching = false
kv-cache-memory = 4096
dtype = "float32"
level = 2
"""
ENVIRONMENT = {
    "PAGEFORK_MAX_TOKENS": "none",
    "PAGEFORK_STOP": json.dumps(["a b", '"']),
    "PAGEFORK_STOP_TOKEN_IDS": "[3]",
    "PAGEFORK_TOP_K": "-1",
    "PAGEFORK_TEMPERATURE": "0.5",
    "PAGEFORK_LOGIT_BIAS": '{"5": 1.5, "6": -2}',
    "PAGEFORK_IGNORE_EOS": "true",
    "PAGEFORK_SKIP_SPECIAL_TOKENS": "false",
    "PAGEFORK_SEED": "7",
    "PAGEFORK_ENGINE_SEED": "8",
    "PAGEFORK_ENABLE_PREFIX_CACHING": "0",
    "PAGEFORK_KV_CACHE_MEMORY": "4096",
    "PAGEFORK_DTYPE": "float32",
    "PAGEFORK_LEVEL": "2",
    "PAGEFORK_TOP_P": "",
}

TABLES = """
output-len = 5
num-prompts = 2
max-tokens = 3
[generate]
max-tokens = 2
block-size = 4
[bench]
input_len = 4
output-len = 3
[bench.throughput]
output-json = "RESULT"
output-len = 2
[bench.latency]
output-len = 9
"""


def received(*arguments: str, **environment: str) -> tuple[Given, Given, int]:
    """What a command gets for two Structs and for a flag of its own."""
    app, got = typer.Typer(), []

    @command(app)
    def both(*, level: int = 0, params: Annotated[Given, SamplingParams], engine: Annotated[Given, EngineConfig]) -> None:
        got.append((params, engine, level))

    result = CliRunner(env=environment).invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return got[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pagefork.toml"


def test_flags_file_and_environment_give_a_command_the_same_values(file: Path) -> None:
    file.write_text(FILE)
    from_flags = received(*FLAGS)
    assert len(from_flags[0]) == 9 and len(from_flags[1]) == 4
    assert received("--config", str(file)) == from_flags
    assert received(**ENVIRONMENT) == from_flags
    assert received(PAGEFORK_CONFIG=str(file)) == from_flags


def test_outputs_are_the_same_with_flags_with_a_file_and_with_the_environment(file: Path) -> None:
    file.write_text("temperature = 0.9\ntop-k = 20\nseed = 3\nmax-tokens = 12\nlogit-bias = { 264 = -9 }\nblock-size = 4\n")
    flags = ["--temperature", ".9", "--top-k", "20", "--seed", "3", "--max-tokens", "12", "--logit-bias", "264=-9"]
    variables = {
        "PAGEFORK_TEMPERATURE": "0.9",
        "PAGEFORK_TOP_K": "20",
        "PAGEFORK_SEED": "3",
        "PAGEFORK_MAX_TOKENS": "12",
        "PAGEFORK_LOGIT_BIAS": '{"264": -9}',
    }
    [expected] = generated(*flags, "--block-size", "4", PROMPT)
    assert len(expected["outputs"][0]["token_ids"]) == 12
    for arguments, environment in ((["--config", str(file)], {}), (["--block-size", "4"], variables)):
        [request] = generated(*arguments, PROMPT, **environment)
        assert request["outputs"] == expected["outputs"]


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(file: Path) -> None:
    file.write_text("block-size = 8\n")
    flag, variable, config = ["--block-size", "2"], {"PAGEFORK_BLOCK_SIZE": "4"}, ["--config", str(file)]
    for has_flag, has_variable, has_file in itertools.product((False, True), repeat=3):
        arguments = [*(flag if has_flag else ()), *(config if has_file else ())]
        done = pagefork("info", "--json", "--num-blocks", "600", *arguments, **(variable if has_variable else {}))
        expected = 2 if has_flag else 4 if has_variable else 8 if has_file else 16
        assert json.loads(done.stdout)["block_size"] == expected


def test_a_flag_can_take_back_what_the_file_switches_on(file: Path) -> None:
    file.write_text("ignore-eos = true\n")
    assert received("--config", str(file))[0] == {"ignore_eos": True}
    assert received("--config", str(file), "--no-ignore-eos")[0] == {"ignore_eos": False}
    file.write_text("[info]\njson = true\n")
    assert pagefork("info", "--config", str(file)).stdout.startswith("{")
    assert not pagefork("info", "--config", str(file), "--no-json").stdout.startswith("{")


def outputs(*arguments: str, seed: str | None = "5", **environment: str) -> Any:
    drawn = [] if seed is None else ["--seed", seed]
    return generated(*drawn, "--max-tokens", "12", *arguments, PROMPT, **environment)[0]["outputs"]


def test_a_preset_wins_over_lower_places_and_loses_to_its_own(file: Path) -> None:
    file.write_text('temperature = 0.0\npreset = "chat"\n')
    config = ["--config", str(file)]
    assert outputs(*config) == outputs("--preset", "chat", "--temperature", "0")
    assert outputs(*config, "--preset", "creative") == outputs("--preset", "creative")
    assert outputs(*config, PAGEFORK_PRESET="creative") == outputs("--preset", "creative")
    assert outputs(*config, "--temperature", "0.3") == outputs("--preset", "chat", "--temperature", "0.3")
    assert outputs("--preset", "chat") != outputs("--preset", "creative")


def test_a_preset_in_a_table_wins_over_the_keys_above_it(file: Path) -> None:
    file.write_text('temperature = 0.0\n[generate]\npreset = "creative"\n')
    assert outputs("--config", str(file)) == outputs("--preset", "creative")
    file.write_text('preset = "creative"\n[generate]\ntemperature = 0.0\n')
    assert outputs("--config", str(file)) == outputs("--preset", "creative", "--temperature", "0")


def test_a_flag_can_take_back_a_number_of_the_file(file: Path) -> None:
    file.write_text("seed = 7\nnum-blocks = 8\n")
    assert received("--config", str(file), "--seed", "none", "--num-blocks", "none") == ({"seed": None}, {"num_blocks": None}, 0)


BEAMS = ["--strategy", "beam", "--beam-width", "3"]


def test_what_the_file_says_of_other_strategies_is_left_alone_when_one_is_chosen(file: Path) -> None:
    file.write_text('temperature = 0.5\npreset = "creative"\nnum-simulations = 3\nbeam-width = 3\nlength-penalty = 0.0\n')
    config = ["--config", str(file)]
    assert outputs(*config, *BEAMS, seed=None) == outputs(*BEAMS, "--length-penalty", "0", seed=None)
    assert outputs(*config, seed=None, PAGEFORK_STRATEGY="beam") == outputs(*BEAMS, "--length-penalty", "0", seed=None)
    assert_refused(pagefork("generate", *config, PROMPT), "'num_simulations'", "MCTSParams")


def test_what_suits_no_strategy_of_its_own_place_is_refused(file: Path) -> None:
    file.write_text('strategy = "beam"\ntemperature = 0.5\n')
    assert_refused(pagefork("generate", "--config", str(file), PROMPT), "BeamSearchParams", "'temperature'")
    file.write_text('strategy = "beam"\n')
    for flag in (["--temperature", "0.5"], ["--preset", "chat"]):
        assert_refused(pagefork("generate", "--config", str(file), *flag, PROMPT), flag[0].strip("-"))
    file.write_text('strategy = "beams"\n')
    assert_refused(pagefork("generate", "--config", str(file), PROMPT), str(file), '"beam"')


def test_a_table_holds_for_its_command_or_group_alone(file: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    file.write_text(TABLES.replace("RESULT", str(result)))
    config = ["--config", str(file)]
    assert json.loads(pagefork("info", "--json", *config).stdout)["block_size"] == 16
    [request] = generated("--ignore-eos", *config, PROMPT)
    assert len(request["outputs"][0]["token_ids"]) == 2
    assert pagefork("bench", "throughput", *config).code == 0
    assert json.loads(result.read_text())["total_num_tokens"] == 2 * (4 + 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tempratur = 1", ["'tempratur'", "temperature"]),
        ("[generate]\nnum-prompts = 3", ["[generate]", "'num-prompts'"]),
        ("[bench]\nsystem = 'x'", ["[bench]", "'system'"]),
        ("[serf]\ntop_k = 3", ["'serf'"]),
        ("top-k = 1\ntop_k = 2", ["'top_k'", "twice"]),
        ('config = "other.toml"', ["'config'"]),
        ("top-k = ", ["is not TOML"]),
        ("top-k = '5'", ["top-k = '5'", "int"]),
        ("top-k = 1.5", ["top-k", "int"]),
        ("top-k = true", ["top-k", "int"]),
        ("temperature = -1", ["temperature = -1", ">= 0"]),
        ("temperature = nan", ["temperature = nan"]),
        ('dtype = "float8"', ["dtype", "bfloat16"]),
        ('stop = "x"', ["stop", "list[str]"]),
        ("logit-bias = { a = 1.0 }", ["logit-bias", "dict[int, float]"]),
        ("file = 3", ["file = 3"]),
        ('preset = "cod"', ["code, factual"]),
    ],
)
def test_what_a_file_may_not_say_is_refused_in_one_line(text: str, named: list[str], file: Path) -> None:
    file.write_text(text)
    done = pagefork("generate", "--config", str(file), PROMPT)
    assert_refused(done, *named, *([] if "preset" in text else [str(file)]))


def test_a_file_that_is_missing_or_not_text_is_refused(file: Path) -> None:
    assert_refused(pagefork("info", "--config", str(file)), str(file), "No such file")
    assert_refused(pagefork("info", PAGEFORK_CONFIG=str(file)), str(file), "No such file")
    file.write_bytes(b"model = '\xff'")
    assert_refused(pagefork("info", "--config", str(file)), str(file), "utf-8")


@pytest.mark.parametrize(
    ("variable", "text", "named"),
    [
        ("PAGEFORK_TOP_K", "many", "int"),
        ("PAGEFORK_TOP_P", "0", "> 0, <= 1"),
        ("PAGEFORK_STOP", "x", "JSON"),
        ("PAGEFORK_STOP_TOKEN_IDS", '["3"]', "list[int]"),
        ("PAGEFORK_IGNORE_EOS", "perhaps", "bool"),
    ],
)
def test_a_variable_that_its_flag_cannot_take_is_refused_by_its_name(variable: str, text: str, named: str) -> None:
    assert_refused(pagefork("generate", PROMPT, **{variable: text}), variable, named)


def test_an_unknown_variable_is_warned_of_and_one_of_another_command_is_left_alone() -> None:
    done = pagefork("info", "--json", "--num-blocks", "8", PAGEFORK_BLOCK_SISE="4", PAGEFORK_TOP_K="many")
    assert (done.code, json.loads(done.stdout)["block_size"]) == (0, 16)
    assert done.stderr.startswith("pagefork: PAGEFORK_BLOCK_SISE in the environment is no flag; did you mean PAGEFORK_BLOCK_SIZE")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["info"], ["generate", PROMPT], ["explain", "--next", PROMPT], ["bench", "throughput"]])
def test_the_example_of_the_documentation_serves_every_command(arguments: list[str], file: Path) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    file.write_text(example)
    done = pagefork(*arguments, "--config", str(file))
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout

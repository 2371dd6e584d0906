"""Every decoding strategy through the real command: what it prints is what the same parameters give in process."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.cli import PROMPT, assert_refused, generated, pagefork

from pagefork import LLM, BeamSearchParams, ContrastiveSearchParams, MCTSParams, SamplingParams
from pagefork.cli.generate import engine_config
from pagefork.cli.strategy import STRATEGIES
from pagefork.scheduler.params import CommonParams
from pagefork.value_functions import parses_as_python

EXACT = ["--dtype", "float32", "--max-tokens", "6", "--ignore-eos"]
SEARCHES: dict[str, tuple[list[str], CommonParams]] = {
    "beam": (
        ["--beam-width", "3", "--n", "2", "--length-penalty", "0.5", "--early-stopping", "never"],
        BeamSearchParams(beam_width=3, n=2, length_penalty=0.5, early_stopping="never"),
    ),
    "contrastive": (["--top-k", "4", "--alpha", "0.5"], ContrastiveSearchParams(top_k=4, alpha=0.5)),
    "mcts": (
        ["--num-simulations", "12", "--top-k", "4", "--value-fn", "parses_as_python", "--seed", "3"],
        MCTSParams(num_simulations=12, top_k=4, value_fn=parses_as_python(PROMPT), seed=3),
    ),
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32", num_blocks=300, hidden_states=True)


@pytest.mark.parametrize("strategy", SEARCHES)
def test_the_flags_of_a_search_are_its_parameters(strategy: str, llm: LLM) -> None:
    flags, params = SEARCHES[strategy]
    [request] = generated("--strategy", strategy, *flags, *EXACT, "--trace", PROMPT)
    [expected] = llm.generate([PROMPT], params.replace(max_tokens=6, ignore_eos=True), use_tqdm=False)
    assert [output["token_ids"] for output in request["outputs"]] == [output.token_ids for output in expected.outputs]
    assert [output["score"] for output in request["outputs"]] == [
        output.score if output.score is None else pytest.approx(output.score, abs=1e-4) for output in expected.outputs
    ]
    trace = request["trace"]
    assert (trace["strategy"], trace["complete"]) == (strategy, True)
    assert len(trace["steps"]) >= 6 and {step["type"] for step in trace["steps"]} == {strategy}
    assert trace["usage"]["forks"] > 0


def test_a_value_function_is_made_for_each_prompt() -> None:
    flags = ["--strategy", "mcts", "--num-simulations", "12", "--top-k", "4", "--value-fn", "parses_as_python", *EXACT]
    prompts = [PROMPT, "x = [\n"]
    together = generated(*flags, *prompts)
    assert [request["outputs"] for request in together] == [generated(*flags, prompt)[0]["outputs"] for prompt in prompts]


def test_several_beams_are_printed_with_their_scores() -> None:
    arguments = ["--strategy", "beam", "--n", "3", *EXACT, PROMPT, "import os"]
    found: dict[str, Any] = {}
    for line in pagefork("generate", *arguments).stdout.splitlines():
        match = re.fullmatch(r"(\[\d\.\d\]) (-\d+\.\d{3}) (.*)", line)
        assert match, line
        found.setdefault(match[1], (match[2], []))[1].append(match[3])
    expected = {
        f"[{place}.{output['index'] + 1}]": (f"{output['score']:.3f}", output["text"].removesuffix("\n").split("\n"))
        for place, request in enumerate(generated(*arguments), 1)
        for output in request["outputs"]
    }
    assert found == expected
    for place in (1, 2):
        scores = [float(found[f"[{place}.{output}]"][0]) for output in (1, 2, 3)]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_single_output_is_its_raw_text_by_any_strategy(strategy: str) -> None:
    flags = ["--strategy", strategy, *EXACT, *(["--num-simulations", "4"] if strategy == "mcts" else [])]
    done = pagefork("generate", *flags, PROMPT)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout == generated(*flags, PROMPT)[0]["outputs"][0]["text"] != ""


def test_what_a_search_cannot_honour_is_refused_before_a_model_is_loaded() -> None:
    nowhere = ["--model", "/nowhere", "x"]
    for strategy in STRATEGIES:
        assert_refused(pagefork("generate", "--strategy", strategy, "--trace", *nowhere), "--trace", "--json")
        assert_refused(pagefork("generate", "--strategy", strategy, "--logprobs", "2", *nowhere), "--logprobs", "--json")
    assert_refused(pagefork("generate", "--strategy", "beam", "--preset", "chat", *nowhere), "--preset", "sample")
    assert_refused(pagefork("generate", "--strategy", "mcts", "--value-fn", "nice", *nowhere), "'nice'", "parses_as_python")
    assert_refused(pagefork("generate", "--strategy", "beam", "--n", "5", *nowhere), "n=5", "beam_width=4")
    assert_refused(pagefork("generate", "--strategy", "contrastive", "--hidden-states", "false", "x"), "hidden_states")


def test_the_engine_keeps_hidden_states_for_the_search_that_reads_them_unless_it_is_told() -> None:
    for params in (SamplingParams(), *(params for _, params in SEARCHES.values())):
        assert engine_config({}, params).hidden_states == (True if params.needs_hidden_states else "auto")
    assert engine_config({"hidden_states": False}, ContrastiveSearchParams()).hidden_states is False

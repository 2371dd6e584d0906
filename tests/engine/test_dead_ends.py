"""Sequences after which nothing is allowed: a search goes on without them, and ends with what it has, or with an error."""

from __future__ import annotations

from typing import Any

import pytest

from pagefork import LLM, BeamSearchParams, ContrastiveSearchParams, InvalidRequestError, MCTSParams, NoTokenError
from pagefork.scheduler.params import CommonParams

PROMPT = "import os\n"


def closed(ends: set[int]) -> Any:
    """Nothing may follow these tokens."""

    def processor(prompt: list[int], output: list[int], logits: Any) -> Any:
        if output and output[-1] in ends:
            logits[:] = float("-inf")
        return logits

    return processor


def best_first(llm: LLM, count: int) -> list[int]:
    """The most probable tokens after the prompt."""
    [output] = llm.generate([PROMPT], BeamSearchParams(beam_width=count, n=count, max_tokens=1, ignore_eos=True), use_tqdm=False)
    return [completion.token_ids[0] for completion in output.outputs]


@pytest.mark.parametrize(
    "params",
    [
        BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True),
        BeamSearchParams(beam_width=4, num_beam_groups=2, diversity_penalty=0.1, max_tokens=6, ignore_eos=True),
        BeamSearchParams(beam_width=4, num_beam_groups=4, diversity_penalty=9.0, max_tokens=6, ignore_eos=True),
    ],
    ids=["beams", "two groups", "four groups"],
)
def test_beams_that_can_not_go_on_are_lost_alone(demo: LLM, params: CommonParams) -> None:
    dead, *_ = best_first(demo, 4)
    [output] = demo.generate([PROMPT], params.replace(logits_processors=[closed({dead})]), use_tqdm=False)
    assert output.error is None and output.outputs[0].token_ids[0] != dead
    assert len(output.outputs[0].token_ids) == 6 and dead not in output.outputs[0].token_ids[:-1]


def test_a_search_whose_beams_all_end_dead_returns_what_has_finished(demo: LLM) -> None:
    first = best_first(demo, 4)
    params = BeamSearchParams(
        beam_width=3, max_tokens=6, stop_token_ids=[first[1]], logits_processors=[closed(set(range(4096)) - {first[1]})]
    )
    [output] = demo.generate([PROMPT], params, use_tqdm=False)
    assert output.error is None
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([first[1]], "stop")


@pytest.mark.parametrize(
    "params",
    [
        BeamSearchParams(beam_width=3, max_tokens=6),
        BeamSearchParams(beam_width=4, num_beam_groups=2, max_tokens=6),
        ContrastiveSearchParams(max_tokens=6),
        MCTSParams(num_simulations=6, max_tokens=6),
    ],
    ids=lambda params: type(params).__name__,
)
def test_a_search_that_has_nothing_left_ends_with_an_error_alone(demo: LLM, params: CommonParams) -> None:
    everywhere = params.replace(logits_processors=[closed(set(range(4096)))])
    failed, fine = demo.generate([PROMPT] * 2, [everywhere, params], use_tqdm=False)
    assert isinstance(failed.error, NoTokenError) and failed.outputs[0].finish_reason == "error"
    assert fine.error is None and fine.outputs[0].token_ids
    demo.engine.check()
    stats = demo.engine.stats()
    assert stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (BeamSearchParams(beam_width=65), "65 sequences at once were asked for; max_num_seqs allows 64: lower beam_width"),
        (ContrastiveSearchParams(top_k=65), "lower top_k, or raise it"),
        (MCTSParams(leaf_batch_size=65, num_simulations=100), "lower n or leaf_batch_size, or raise it"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_search_that_is_too_wide_is_refused_before_anything_runs(demo: LLM, params: CommonParams, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        demo.generate([PROMPT] * 2, [BeamSearchParams(max_tokens=2), params], use_tqdm=False)
    assert not demo.engine.has_unfinished_requests()

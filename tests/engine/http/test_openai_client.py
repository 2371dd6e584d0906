"""The official client, unchanged, gets what the engine in process gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from support.gateway import TEMPLATE, Pair

from pagefork import LLM, BeamSearchParams, ContrastiveSearchParams, MCTSParams, RequestOutput, SamplingParams

PROMPTS = ["def f(", "import os\n", "class Queue:\n    def"]
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Sort."}]},
]
DRAWN: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 12, "n": 2}


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def texts(outputs: list[RequestOutput]) -> list[tuple[str, str | None]]:
    return [(output.text, output.finish_reason) for request in outputs for output in request.outputs]


def told(answer: Any) -> list[tuple[str, str | None]]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [(choice.text, choice.finish_reason) for choice in answer.choices]


def gathered(events: Any) -> tuple[list[tuple[str, str | None]], Any]:
    """Texts and finish reasons by choice, and the usage where an event had it."""
    found: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    for event in events:
        usage = event.usage or usage
        for choice in event.choices:
            assert choice.index not in reasons  # nothing comes after an end
            text = choice.text if hasattr(choice, "text") else choice.delta.content or ""
            found[choice.index] = found.get(choice.index, "") + text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return [(found[index], reasons.get(index)) for index in sorted(found)], usage


@pytest.mark.parametrize(
    "prompt", [PROMPTS[0], PROMPTS, [316, 286, 8], [[316, 286, 8], [5, 6]]], ids=["text", "texts", "ids", "lists"]
)
def test_completions_are_those_of_the_engine(client: OpenAI, demo: LLM, prompt: Any) -> None:
    expected = demo.generate(prompt, SamplingParams(**DRAWN), use_tqdm=False)
    answer = client.completions.create(model="demo", prompt=prompt, **DRAWN)
    assert told(answer) == texts(expected)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "demo"
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in expected)
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for output in expected for one in output.outputs)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up_to_the_whole_answer(client: OpenAI, echo: bool) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPTS, echo=echo, **DRAWN)
    with client.completions.create(
        model="demo", prompt=PROMPTS, echo=echo, stream=True, stream_options={"include_usage": True}, **DRAWN
    ) as events:
        found, usage = gathered(events)
    assert found == told(whole)
    assert whole.usage is not None and usage.completion_tokens == whole.usage.completion_tokens
    assert all(text.startswith(PROMPTS[at // 2]) == echo for at, (text, _) in enumerate(found))


def test_a_stream_without_include_usage_has_none(client: OpenAI) -> None:
    with client.completions.create(model="demo", prompt="x", max_tokens=2, stream=True) as events:
        assert gathered(events)[1] is None


def test_stop_texts_bias_and_penalties_are_honoured(client: OpenAI, demo: LLM) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "frequency_penalty": 1.5, "presence_penalty": -0.5}
    expected = demo.generate("def f(", SamplingParams(**fields, stop=["return"], logit_bias={5: 3.0}), use_tqdm=False)
    answer = client.completions.create(model="demo", prompt="def f(", stop="return", logit_bias={"5": 3}, **fields)
    assert told(answer) == texts(expected)
    answer = client.completions.create(model="demo", prompt="def f(", max_tokens=3, temperature=0, stop=[":"], best_of=1)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_fields_that_are_not_openai_s_come_in_the_extra_body(client: OpenAI, demo: LLM) -> None:
    extra: dict[str, Any] = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 6, "ignore_eos": True}
    extra |= {"bad_words": ["self"], "skip_special_tokens": False, "include_stop_str_in_output": True, "stop_token_ids": [12]}
    expected = demo.generate("def f(", SamplingParams(**DRAWN, **extra), use_tqdm=False)
    answer = client.completions.create(model="demo", prompt="def f(", extra_body=extra | {"priority": 3}, **DRAWN)
    assert told(answer) == texts(expected)


@pytest.mark.parametrize("stream", [False, True])
def test_searches_come_in_the_extra_body(client: OpenAI, demo: LLM, stream: bool) -> None:
    searches: list[tuple[Any, dict[str, Any]]] = [
        (BeamSearchParams(beam_width=3, n=2, max_tokens=8), {"beam_search": {"beam_width": 3, "n": 2}}),
        (ContrastiveSearchParams(top_k=3, max_tokens=8), {"contrastive_search": {"top_k": 3}}),
        (
            MCTSParams(num_simulations=4, seed=3, max_tokens=8, value_fn="brackets_balance"),
            {"mcts": {"num_simulations": 4, "value_fn": "brackets_balance"}, "seed": 3},
        ),
    ]
    for params, body in searches:
        expected = demo.generate("def f(", params, use_tqdm=False)
        answer: Any = client.completions.create(model="demo", prompt="def f(", max_tokens=8, stream=stream, extra_body=body)
        assert (gathered(answer)[0] if stream else told(answer)) == texts(expected)


def test_chat_answers_through_the_template(client: OpenAI, demo: LLM) -> None:
    fields = DRAWN | {"max_tokens": 10}
    expected = demo.chat(MESSAGES, SamplingParams(**fields), use_tqdm=False, chat_template=TEMPLATE)
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, **fields)
    assert [(choice.message.content, choice.finish_reason) for choice in answer.choices] == texts(expected)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(expected[0].prompt_token_ids)
    assert {choice.message.role for choice in answer.choices} == {"assistant"} and answer.id.startswith("chatcmpl-")
    with client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **fields) as events:
        assert gathered(events)[0] == texts(expected)


def test_chat_goes_on_until_the_model_s_length_or_max_completion_tokens(client: OpenAI) -> None:
    short = client.chat.completions.create(model="demo", messages=MESSAGES, max_completion_tokens=3, temperature=0)
    assert short.usage is not None and short.usage.completion_tokens == 3
    model = client.models.retrieve("demo")
    most: list[Any] = [{"role": "user", "content": " 1" * 900}]
    long = client.chat.completions.create(model="demo", messages=most, temperature=0, extra_body={"ignore_eos": True})
    assert long.usage is not None and long.usage.total_tokens == model.model_extra["max_model_len"]  # type: ignore[index]


def test_a_template_has_variables_and_can_go_on_with_the_last_message(client: OpenAI, demo: LLM) -> None:
    params = SamplingParams(max_tokens=4, temperature=0)
    turn = [*MESSAGES, {"role": "assistant", "content": "def so"}]
    expected = demo.chat(turn, params, False, TEMPLATE, add_generation_prompt=False, continue_final_message=True)
    answer = client.chat.completions.create(
        model="demo", messages=turn, max_tokens=4, temperature=0, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content == expected[0].outputs[0].text
    expected = demo.chat(MESSAGES, params, False, TEMPLATE, chat_template_kwargs={"mood": "glad"})
    extra = {"chat_template_kwargs": {"mood": "glad"}}
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=4, temperature=0, extra_body=extra)
    assert answer.choices[0].message.content == expected[0].outputs[0].text
    assert answer.usage is not None and answer.usage.prompt_tokens == len(expected[0].prompt_token_ids)


def test_fields_without_meaning_and_trivial_ones_are_accepted(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=[],
        response_format={"type": "text"},
        modalities=["text"],
        tool_choice="none",
        service_tier="auto",
    )
    assert answer.choices[0].message.tool_calls is None


def test_errors_have_the_classes_of_the_client(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as large:
        client.completions.create(model="demo", prompt="x", n=1000)
    assert (large.value.code, large.value.param) == ("too_large", "n")
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="demo", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="no such role"):
        client.chat.completions.create(model="demo", messages=[{"role": "refused", "content": "x"}])  # type: ignore[list-item, misc]


def test_the_asynchronous_client_runs_many_calls_at_once(pair: Pair, demo: LLM) -> None:
    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int) -> Any:
                fields: dict[str, Any] = {"model": "demo", "prompt": "def f(", "max_tokens": 20, "seed": seed}
                if seed % 2:
                    return told(await client.completions.create(**fields))
                return gathered([event async for event in await client.completions.create(stream=True, **fields)])[0]

            return await asyncio.gather(*map(one, range(24)))

    expected = demo.generate(["def f("] * 24, [SamplingParams(max_tokens=20, seed=seed) for seed in range(24)], use_tqdm=False)
    assert asyncio.run(ask()) == [texts([output]) for output in expected]


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")

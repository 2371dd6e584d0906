"""Log-probs in both of OpenAI's shapes are those of the engine in process."""

from __future__ import annotations

from typing import Any

import pytest
from support.gateway import TEMPLATE, Pair

from pagefork import LLM, Logprob, SamplingParams

CLOSE = 1e-4
MESSAGES = [{"role": "user", "content": "Sort."}]


def close(first: float | None, second: float | None) -> bool:
    return first == second if first is None or second is None else abs(first - second) < CLOSE


def by_text(table: dict[int, Logprob]) -> dict[str, float]:
    return {entry.decoded_token or "": entry.logprob for entry in sorted(table.values(), key=lambda entry: entry.logprob)}


def test_completions_tell_of_every_token_and_its_place(pair: Pair, demo: LLM) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "logprobs": 3}
    [expected] = demo.generate("def f(", SamplingParams(**fields), use_tqdm=False)[0].outputs
    [choice] = pair.complete(**fields).json()["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] == expected.text
    assert found["text_offset"] == [len("".join(found["tokens"][:at])) for at in range(8)]
    assert expected.logprobs is not None
    for at, (token, table) in enumerate(zip(expected.token_ids, expected.logprobs, strict=True)):
        assert close(found["token_logprobs"][at], table[token].logprob)
        assert found["top_logprobs"][at].keys() == by_text(table).keys()
        assert all(close(value, by_text(table)[text]) for text, value in found["top_logprobs"][at].items())


def test_a_stream_has_the_same_log_probs(pair: Pair) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "logprobs": 2, "n": 1}
    whole = pair.complete(**fields).json()["choices"][0]["logprobs"]
    events = events_of(pair.complete(stream=True, **fields).text)
    parts = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert [entry for part in parts for entry in part[name]] == whole[name]
    assert all(map(close, [value for part in parts for value in part["token_logprobs"]], whole["token_logprobs"]))


def test_echo_scores_the_prompt_with_no_token_generated(pair: Pair, demo: LLM) -> None:
    prompt = "def f(self):\n    return"
    [expected] = demo.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=2), use_tqdm=False)
    answer = pair.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=2).json()
    [choice] = answer["choices"]
    assert choice["text"] == prompt == "".join(choice["logprobs"]["tokens"])
    assert answer["usage"]["completion_tokens"] == 0
    assert choice["logprobs"]["token_logprobs"][0] is None and choice["logprobs"]["top_logprobs"][0] is None
    assert expected.prompt_logprobs is not None
    for at, token in enumerate(expected.prompt_token_ids[1:], 1):
        table = expected.prompt_logprobs[at]
        assert table is not None and close(choice["logprobs"]["token_logprobs"][at], table[token].logprob)


def test_echo_with_an_output_tells_of_both(pair: Pair) -> None:
    [choice] = pair.complete(prompt=[316, 286, 8], max_tokens=3, temperature=0, echo=True, logprobs=0).json()["choices"]
    assert choice["text"].startswith("def f(") and "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert len(choice["logprobs"]["token_logprobs"]) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_chat_tells_of_the_chosen_token_and_the_top_ones(pair: Pair, demo: LLM, stream: bool) -> None:
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=8, logprobs=3)
    [expected] = demo.chat(MESSAGES, params, use_tqdm=False, chat_template=TEMPLATE)[0].outputs
    body = {"model": "demo", "messages": MESSAGES, "temperature": 1.5, "seed": 5, "max_tokens": 8, "logprobs": True}
    answer = pair.post("/v1/chat/completions", body | {"top_logprobs": 3, "stream": stream})
    choices = [choice for event in events_of(answer.text) for choice in event["choices"]] if stream else answer.json()["choices"]
    content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert expected.logprobs is not None and len(content) == 8
    for entry, token, table in zip(content, expected.token_ids, expected.logprobs, strict=True):
        assert entry["token"] == table[token].decoded_token and close(entry["logprob"], table[token].logprob)
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 3
        best = sorted((other.logprob for other in table.values()), reverse=True)[:3]
        assert all(map(close, [other["logprob"] for other in entry["top_logprobs"]], best))


def test_chat_without_top_logprobs_has_the_chosen_token_alone(pair: Pair) -> None:
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 2, "logprobs": True}
    [choice] = pair.post("/v1/chat/completions", body).json()["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[], []]


def events_of(text: str) -> list[dict[str, Any]]:
    import json

    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]

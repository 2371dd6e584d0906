"""Two hundred random settings of SamplingParams, through LLM, against float64 by the book on transformers' logits."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from transformers import AutoModelForCausalLM

from pagefork import LLM, CompletionOutput, SamplingParams
from pagefork.demo import demo_path

CASES = 200
TOKENS = 10
PROMPTS = ["def read_lines(path):\n    ", "import os\nimport sys\nimport os\nimport sys\n", "x = x + x + x", "class A:\n"]
WORDS = ["self", "import os", "\n    ", "return", "x"]


def some_settings(rng: random.Random) -> dict[str, Any]:
    """Fields of SamplingParams, each away from its default now and then."""
    likely = {
        "temperature": lambda: rng.choice([0.0, 0.3, 0.8, 1.5]),
        "top_k": lambda: rng.choice([-1, 1, 5, 50, 5000]),
        "top_p": lambda: rng.choice([0.3, 0.9, 0.99]),
        "min_p": lambda: rng.choice([0.02, 0.3]),
        "repetition_penalty": lambda: rng.choice([0.8, 1.3]),
        "frequency_penalty": lambda: rng.choice([-0.5, 0.7]),
        "presence_penalty": lambda: rng.choice([-0.5, 0.7]),
        "no_repeat_ngram_size": lambda: rng.choice([1, 2, 3]),
        "logit_bias": lambda: {rng.randrange(4096): rng.uniform(-9, 9) for _ in range(5)},
        "bad_words": lambda: rng.sample(WORDS, 2),
        "allowed_token_ids": lambda: rng.sample(range(4096), 300),
        "min_tokens": lambda: rng.choice([1, 4]),
        "stop_token_ids": lambda: rng.sample(range(4096), 200),
        "ignore_eos": lambda: True,
    }
    settings = {name: value() for name, value in likely.items() if rng.random() < 0.35}
    n = 1 if settings.get("temperature", 1.0) == 0 else rng.choice([1, 1, 2])
    mode = rng.choice(["raw", "processed"])
    return settings | {"seed": rng.randrange(2**63), "n": n, "logprobs": 2, "logprobs_mode": mode, "max_tokens": TOKENS}


class Reference:
    """What must come next, from transformers' model and the definition of every stage."""

    def __init__(self, llm: LLM) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
        tokenizer = llm.engine.tokenizer
        assert tokenizer is not None
        self._tokens_of = tokenizer.encode_plain
        self._ends = {self._model.config.eos_token_id}

    def check(self, prompt: list[int], settings: dict[str, Any], output: CompletionOutput) -> int:
        """Assert that every token is the one that must be drawn; how many differ where rounding decides."""
        ids = [*prompt, *output.token_ids]
        with torch.inference_mode():
            rows = self._model(torch.tensor([ids])).logits[0].numpy()
        ends = set(settings.get("stop_token_ids", ())) | (set() if settings.get("ignore_eos") else self._ends)
        forms = [self._tokens_of(text) for word in settings.get("bad_words", ()) for text in (word, " " + word.lstrip())]
        spec = {
            **settings,
            "end_ids": ends,
            "bad_words": [tuple(form) for form in forms],
            "allowed_ids": settings.get("allowed_token_ids"),
            "logit_bias": list(settings.get("logit_bias", {}).items()),
        }
        close = 0
        assert output.logprobs is not None
        for step, token in enumerate(output.token_ids):
            history = ids[: len(prompt) + step]
            row = rows[len(history) - 1]
            x = book.adjusted(row, history, len(prompt), spec)
            kept = book.kept(x, spec)
            expected, margin = book.draw(kept.probs, book.uniform(settings["seed"], output.index, len(history)))
            gap = np.diff(np.sort(x)[-2:])[0]
            if settings.get("temperature") == 0:
                expected, margin = int(np.argmax(x)), gap
            tied = settings.get("top_k", 0) > 0 and _tie_at(x, settings["top_k"])
            if token != expected:
                assert tied or min(margin, kept.margin) < 1e-5, (settings, step)
                close += 1
            elif not tied and kept.margin > 1e-5:
                with np.errstate(divide="ignore"):
                    logp = np.log(kept.probs) if settings["logprobs_mode"] == "processed" else book.log_softmax(row)
                assert abs(output.logprobs[step][token].logprob - logp[token]) < 1e-3
            last = step == len(output.token_ids) - 1
            assert (token in ends) == (last and output.finish_reason == "stop"), "an end token ends the output, and nothing else"
            assert token not in ends or step >= settings.get("min_tokens", 0)
        assert output.finish_reason == "stop" or len(output.token_ids) == TOKENS
        return close


def _tie_at(x: book.Row, k: int) -> bool:
    """Whether the k-th largest value is too close to the next to tell which of them stays."""
    best = np.sort(x)[::-1]
    return k < len(best) and bool(best[k - 1] - best[k] < 1e-4)


def test_every_token_of_two_hundred_random_settings_is_the_one_the_definition_demands(demo: LLM) -> None:
    rng = random.Random(8)
    cases = [(rng.choice(PROMPTS), some_settings(rng)) for _ in range(CASES)]
    outputs = demo.generate(
        [prompt for prompt, _ in cases], [SamplingParams(**settings) for _, settings in cases], use_tqdm=False
    )
    reference = Reference(demo)
    draws = close = 0
    for (_, settings), request in zip(cases, outputs, strict=True):
        assert request.error is None and len(request.outputs) == settings["n"]
        for output in request.outputs:
            draws += len(output.token_ids)
            close += reference.check(request.prompt_token_ids, settings, output)
    assert draws > 1500 and close < 0.005 * draws, f"{close} of {draws} draws are excused"


@pytest.mark.parametrize("stop", [["\n"], ["self", "def"], ["e"]])
def test_streamed_text_equals_the_final_text_for_every_kind_of_end(demo: LLM, stop: list[str]) -> None:
    """Texts only grow, whatever ends them: stop texts kept or cut, token limits, end tokens."""
    rng = random.Random(len(stop[0]))
    shown: dict[tuple[str, int], str] = {}
    engine = demo.engine
    for number in range(40):
        settings = some_settings(rng) | {"stop": stop, "include_stop_str_in_output": bool(number % 2), "max_tokens": 24}
        settings["skip_special_tokens"] = bool(number % 3)
        engine.add_request(f"text {number}", rng.choice(PROMPTS), SamplingParams(**settings))
    reasons = set()
    while engine.has_unfinished_requests():
        for request in engine.step():
            for output in request.outputs:
                key = (request.request_id, output.index)
                before = shown.get(key, "")
                assert output.text.startswith(before), "a text that was shown has changed"
                shown[key] = output.text
                if output.finish_reason == "stop" and isinstance(output.stop_reason, str):
                    kept = output.text.endswith(output.stop_reason)
                    assert kept == bool(int(request.request_id.split()[1]) % 2)
                    reasons.add("text")
                elif output.finish_reason:
                    reasons.add(output.finish_reason)
    assert reasons >= {"text", "length"}

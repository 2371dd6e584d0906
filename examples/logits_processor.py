"""Logits processors, functions between the model and the draw: text of digits only, and brackets that always match.

    python examples/logits_processor.py [--model DIRECTORY_OR_HUB_ID]

A processor is called as processor(prompt_token_ids, output_token_ids, logits) for every token of its request, and returns
the logits. It depends on these alone: a request that forks, or is taken up again, is the same text with the same past.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from pagefork import LLM, SamplingParams

CLOSES = {")": "(", "]": "[", "}": "{"}


def open_brackets(text: str, stack: str = "") -> str | None:
    """The brackets that are open after a text, outermost first; None where one closes what is not open."""
    for character in text:
        if character in CLOSES.values():
            stack += character
        elif character in CLOSES:
            if not stack.endswith(CLOSES[character]):
                return None
            stack = stack[:-1]
    return stack


class Digits:
    """Bans every token that is not made of digits."""

    def __init__(self, pieces: list[str]) -> None:
        self._banned = torch.tensor([not (piece.isascii() and piece.isdigit()) for piece in pieces])

    def __call__(self, prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        logits[self._banned] = -math.inf
        return logits


class Brackets:
    """Bans tokens whose brackets don't match, or of which more would be open than there are tokens left to close them."""

    def __init__(self, pieces: list[str], max_tokens: int) -> None:
        self._pieces = pieces
        self._max_tokens = max_tokens
        found = ["".join(character for character in piece if character in "()[]{}") for piece in pieces]
        by_brackets: dict[str, list[int]] = {}
        for token, brackets in enumerate(found):
            by_brackets.setdefault(brackets, []).append(token)
        self._tokens = {brackets: torch.tensor(tokens) for brackets, tokens in by_brackets.items()}

    def __call__(self, prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        stack = open_brackets("".join(self._pieces[token] for token in prompt + output))
        if stack is None:
            raise ValueError("the brackets of the prompt don't match")
        left = self._max_tokens - len(output) - 1
        for brackets, tokens in self._tokens.items():
            after = open_brackets(brackets, stack)
            if after is None or len(after) > left:
                logits[tokens] = -math.inf
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    llm = LLM(parser.parse_args().model)
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None, "this model has no tokenizer"
    pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in range(llm.engine.info()["vocab_size"])]

    free = SamplingParams(n=4, temperature=1.0, max_tokens=24, seed=5, ignore_eos=True)
    requests = {
        "free": ("values = [", free),
        "digits": ("PORT = ", free.replace(max_tokens=4, logits_processors=[Digits(pieces)])),
        "brackets": ("values = [", free.replace(logits_processors=[Brackets(pieces, 24)])),
    }
    prompts, params = zip(*requests.values(), strict=True)
    for name, request in zip(requests, llm.generate(prompts, params, use_tqdm=False), strict=True):
        for output in request.outputs:
            text = f"{request.prompt}{output.text}"
            print(f"{name}: {text!r}, {'matched' if open_brackets(text) == '' else 'not matched'}")


if __name__ == "__main__":
    main()

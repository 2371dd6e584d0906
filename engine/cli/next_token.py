"""The next-token distribution under several settings of temperature, top-k, top-p and min-p."""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pagefork.cli.text import label
from pagefork.core import LLMEngine
from pagefork.kernels import apply_min_p, apply_temperature, apply_top_k, apply_top_p
from pagefork.outputs import Logprob
from pagefork.scheduler.params import SamplingParams

TOKEN_WIDTH = 14


class Setting(NamedTuple):
    """One column: the stages in the order in which they apply."""

    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Column(NamedTuple):
    """What a setting makes of a distribution."""

    name: str
    probabilities: Tensor  # float64 [V], 0 for what is taken out
    is_kept: Tensor  # bool [V]
    entropy: float  # bits

    @property
    def kept(self) -> int:
        return int(self.is_kept.sum())


SETTINGS = (
    Setting("temp 0.1", temperature=0.1),
    Setting("temp 0.5", temperature=0.5),
    Setting("temp 1"),
    Setting("temp 2", temperature=2.0),
    Setting("top-k 5", top_k=5),
    Setting("top-p 0.9", top_p=0.9),
    Setting("min-p 0.1", min_p=0.1),
)


def logits_of(logprobs: dict[int, Logprob]) -> Tensor:
    """fp32 [V] from the log-probs of the whole vocabulary."""
    logits = torch.full((max(logprobs) + 1,), -torch.inf)
    logits[list(logprobs)] = torch.tensor([entry.logprob for entry in logprobs.values()])
    return logits


def columns(logits: Tensor, settings: Sequence[Setting] = SETTINGS) -> list[Column]:
    """One column per setting. logits: fp32 [V], up to a constant; log-probs are as good."""
    found = []
    for setting in settings:
        values = apply_temperature(logits[None], setting.temperature)
        values = apply_min_p(apply_top_p(apply_top_k(values, setting.top_k), setting.top_p), setting.min_p)
        found.append(column(setting.name, values[0]))
    return found


def column(name: str, logits: Tensor) -> Column:
    """The column of logits [V] that went through all stages: -inf for what was taken out."""
    chances = torch.softmax(logits.double(), -1)
    bits = torch.special.entr(chances).sum() / math.log(2)
    return Column(name, chances, logits > -torch.inf, float(bits))


def show_next_token(llm: LLMEngine, prompt: str, given: SamplingParams | None, top: int, *, json: bool) -> None:
    """Print the `top` most probable tokens after a prompt under every setting, and under `given` parameters."""
    raw = _first_token(llm, prompt, SamplingParams(temperature=0))
    found = columns(logits_of(raw))
    if given is not None:
        found.append(_given(llm, prompt, given))
    ranked = sorted(raw, key=lambda token: (-raw[token].logprob, token))[:top]
    if json:
        print(json_module.dumps(_as_json(prompt, ranked, raw, found)))
    else:
        _print_table(prompt, ranked, raw, found)


def _first_token(llm: LLMEngine, prompt: str, params: SamplingParams) -> dict[int, Logprob]:
    """The log-prob of every token of the vocabulary."""
    alone = {"max_tokens": 1, "min_tokens": min(1, params.min_tokens), "logprobs": -1}
    llm.add_request("explain", prompt, params.replace(**alone))
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.error is not None:
                raise output.error
    return (output.outputs[0].logprobs or [])[0]


def _given(llm: LLMEngine, prompt: str, params: SamplingParams) -> Column:
    """What the flags of the command line leave, through the whole pipeline of the engine."""
    logits = logits_of(_first_token(llm, prompt, params.replace(logprobs_mode="processed")))
    if params.greedy:
        best = logits.argmax()  # the first of equal ones
        logits = logits.new_full(logits.shape, -float("inf")).index_fill_(0, best, 0.0)
    return column("given flags", logits)


def _as_json(prompt: str, ranked: list[int], raw: dict[int, Logprob], found: list[Column]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "settings": [{"name": column.name, "kept": column.kept, "entropy_bits": column.entropy} for column in found],
        "tokens": [
            {
                "token_id": token,
                "text": raw[token].decoded_token,
                "logprob": raw[token].logprob,
                "probabilities": {column.name: float(column.probabilities[token]) for column in found},
            }
            for token in ranked
        ],
    }


def _print_table(prompt: str, ranked: list[int], raw: dict[int, Logprob], found: list[Column]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("token", no_wrap=True, overflow="ellipsis", max_width=TOKEN_WIDTH)
    for column in found:
        table.add_column(column.name.replace(" ", "\n"), justify="right", no_wrap=True, min_width=5)
    for token in ranked:
        table.add_row(label(raw[token].decoded_token or ""), *(_chance(column, token) for column in found))
    table.add_section()
    table.add_row("tokens kept", *(str(column.kept) for column in found))
    table.add_row("entropy", *(f"{column.entropy:.2f}" for column in found))
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"Next token after {label(prompt)}", soft_wrap=True)
    console.print(table)


def _chance(column: Column, token: int) -> str:
    if not column.is_kept[token]:
        return "-"
    chance = float(column.probabilities[token])
    return "<.001" if chance < 0.0005 else f"{chance:.3f}".removeprefix("0")

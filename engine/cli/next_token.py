"""The next-token distribution under several settings of temperature, top-k, top-p and min-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pagefork.kernels import apply_min_p, apply_temperature, apply_top_k, apply_top_p
from pagefork.outputs import Logprob


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

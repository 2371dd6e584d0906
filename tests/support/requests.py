"""Prompts and parameters that several scheduler tests use."""

from __future__ import annotations

import numpy as np

from pagefork.scheduler.params import CommonParams, SamplingParams
from support.oracle import VOCAB
from support.toys import BeamToyParams, LookToyParams, RolloutToyParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
GROUPS: list[CommonParams] = [
    SamplingParams(n=3, max_tokens=12),
    BeamToyParams(max_tokens=9),
    LookToyParams(max_tokens=9),
    RolloutToyParams(depth=6, max_tokens=4),
]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
